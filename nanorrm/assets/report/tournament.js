"use strict";
// How a tournament is drawn: a knockout as a tree, anything else as a table of who beat whom.
// Which it is, and who stands where, report.py has put into `page`.

const name = (i) => `#${i + 1}`; // responses are numbered from 1

function ranking(record) {
  const { tree, order, remarks } = record.page;
  const open = el("div", { id: "match", "aria-live": "polite" });
  const pick = (match) => open.replaceChildren(...game(record, match));
  const card = (i) => response(name(i), record.responses[i], remarks[i], i === record.champion);
  return [
    el("h3", {}, "Who met whom"),
    el("div", { class: "box bracket" }, tree ? knockout(record, pick) : crossTable(record, pick)),
    open,
    el("h3", {}, "Responses, best rating first"),
    el("div", { class: "two many" }, order.map(card)),
  ];
}

/** One game in full. */
function game(record, [a, b, winner, votes]) {
  const card = (i) => {
    const remarks = i === winner ? [["judge’s choice", ""]] : [];
    return response(name(i), record.responses[i], remarks, i === winner);
  };
  const none = el("p", { class: "soft" }, "The votes of this game were not recorded.");
  return [
    el("h3", {}, `${name(a)} against ${name(b)}`),
    el("div", { class: "two" }, [a, b].map(card)),
    ...(votes ? votesList(votes, [name(a), name(b)]) : [none]),
  ];
}

/** A column for each round, the final at the right, the champion behind it. */
function knockout(record, pick) {
  const head = (_, i, { length }) => span("head", i === length - 1 ? "final" : `round ${i + 1}`);
  const champion = span("champion", `${name(record.champion)} champion`);
  const tree = el("div", { class: "tree" }, branch(record, record.page.tree, pick), champion);
  const says = `Knockout of ${record.responses.length}, champion ${name(record.champion)}`;
  const heads = el("div", { class: "heads" }, record.rounds.map(head));
  return el("div", { class: "knockout", role: "group", "aria-label": says }, heads, tree);
}

/** A game with the games before it to its left. */
function branch(record, [round, place, ...before], pick) {
  const match = record.rounds[round][place];
  const [a, b, winner] = match;
  const line = (i) => {
    const good = record.page.good?.[i];
    const sign = good !== undefined && span(good ? "right" : "wrong", good ? "✓" : "✗");
    const words = name(i) + (i === winner ? " wins" : "");
    return el("div", { class: i === winner ? "won" : "soft" }, words, sign);
  };
  const says = `round ${round + 1}: ${name(a)} against ${name(b)}, ${name(winner)} wins`;
  const choose = ({ currentTarget }) => {
    for (const button of document.querySelectorAll(".match")) button.ariaPressed = "false";
    currentTarget.ariaPressed = "true";
    pick(match);
  };
  const box = { type: "button", class: "match", "aria-label": says, onclick: choose };
  const feeders = before.map((node) => branch(record, node, pick));
  return el(
    "div", { class: "tree" }, feeders.length > 0 && el("div", { class: "before" }, feeders),
    el("button", box, line(a), line(b)), el("div", { class: "wire" }),
  );
}

/** Points of the row against the column; a button shows the first game of the two. */
function crossTable(record, pick) {
  const { standing, points, met } = record.page;
  const games = record.rounds.flat();
  const cell = (i, j) => {
    if (!met[i][j]) return el("td", {}, i === j && "·");
    const [won, played] = met[i][j];
    const says = `${name(i)} against ${name(j)}: ${won} of ${played}`;
    const first = games.find(([a, b]) => (a === i && b === j) || (a === j && b === i));
    const button = { type: "button", "aria-label": says, onclick: () => pick(first) };
    return el("td", {}, el("button", button, String(won)));
  };
  const line = (i) => {
    const first = i === record.champion;
    const head = el("th", { scope: "row" }, name(i) + (first ? " champion" : ""));
    const cells = standing.map((j) => cell(i, j));
    return el("tr", { class: first && "all" }, head, cells, el("td", {}, String(points[i])));
  };
  const heads = [...standing.map(name), "points"].map((words) => el("th", { scope: "col" }, words));
  const top = el("thead", {}, el("tr", {}, el("td"), heads));
  return el("table", { class: "cross" }, top, el("tbody", {}, standing.map(line)));
}
