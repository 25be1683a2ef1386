"use strict";
// The reader of report.html: it lists, searches and shows the records. What is counted over them
// (outcomes, filters, remarks, tables) report.py has put into `page` of each. Text of models enters
// as text nodes only, never as markup.

const $ = (id) => document.getElementById(id);
const records = JSON.parse($("records").textContent);
const ROW = 54; // height of a list row in px, as in the style sheet
let needle = null; // RegExp of the text searched for
let filter = "all";
let shown = []; // indices of the records that pass
let at = -1; // place in `shown` of the record on display
let searching, linking; // timers of the search, and of the address, which is a link to the record

/** An element: el("p", { class: "x", onclick: f }, children...); strings become text nodes. */
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key.slice(2), value);
    else if (value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter(Boolean));
  return node;
}

/** Text from outside in a box, what was searched for marked. */
function textBox(value, kind = "") {
  const text = String(value ?? "");
  const parts = [];
  let end = 0;
  for (const hit of needle ? text.matchAll(needle) : []) {
    parts.push(text.slice(end, hit.index), el("mark", {}, hit[0]));
    end = hit.index + hit[0].length;
  }
  return el("div", { class: `text ${kind}`, dir: "auto" }, parts, text.slice(end));
}

const span = (kind, words) => el("span", { class: kind }, words);
const found = (text) => needle !== null && String(text ?? "").search(needle) >= 0;
const turns = ({ query }) => (Array.isArray(query) ? query : [{ content: query }]);

/** Every text of a record that the search looks through. */
function texts(record) {
  const votes = record.votes ?? record.rounds.flat().flatMap((game) => game[3] ?? []);
  const { id, source, section, a, b, responses = [] } = record;
  const said = [...turns(record).map((turn) => turn.content), ...votes.map((v) => v.thought)];
  return [id, source, section, a, b, ...responses, ...said];
}

// -- the list: only the rows in view exist

function drawRows() {
  const list = $("list");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
  const places = Array.from({ length: Math.max(0, last - first) }, (_, i) => first + i);
  $("rows").replaceChildren(...places.map(row));
  $("rows").style.height = `${shown.length * ROW}px`;
  if (places.includes(at)) list.setAttribute("aria-activedescendant", `row-${shown[at]}`);
  else list.removeAttribute("aria-activedescendant");
}

function row(place) {
  const record = records[shown[place]];
  const { outcome, badge, kind, filters } = record.page;
  const flip = { class: "tag tied", title: "the orders disagree" };
  const start = turns(record).map((turn) => turn.content).join("\n").slice(0, 200);
  return el(
    "div",
    {
      class: "row", role: "option", id: `row-${shown[place]}`,
      "aria-selected": String(place === at), "aria-posinset": place + 1,
      "aria-setsize": shown.length, style: `top: ${place * ROW}px`,
      onclick: () => show(place),
    },
    el(
      "div", { class: "top" }, span(`tag ${outcome}`, badge),
      filters.includes("inconsistent") && el("span", flip, "⇄"),
      span("", `${record.id} · ${kind}`),
    ),
    el("div", { dir: "auto" }, start.replace(/\s+/g, " ") || "(no query)"),
  );
}

function apply() {
  const before = shown[at];
  const section = $("section")?.selectedIndex;
  const plain = $("search").value.trim().replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  needle = plain ? new RegExp(plain, "gi") : null;
  const fits = (record) =>
    record.page.filters.includes(filter) && (!section || record.page.section === section) &&
    (!needle || texts(record).some(found));
  shown = [...records.keys()].filter((i) => fits(records[i]));
  for (const button of $("filters").children) {
    button.setAttribute("aria-pressed", String(button.dataset.name === filter));
  }
  const [some, all] = [shown.length, records.length].map((n) => n.toLocaleString("en"));
  $("count").textContent = `${some} of ${all} record${records.length === 1 ? "" : "s"}`;
  show(Math.max(0, shown.indexOf(before)));
}

function show(place) {
  at = Math.min(Math.max(place, 0), shown.length - 1);
  const [list, detail] = [$("list"), $("detail")];
  if (at < 0) {
    detail.replaceChildren(el("p", { id: "empty" }, "Nothing matches."));
    return drawRows();
  }
  const low = (at + 1) * ROW - list.clientHeight;
  list.scrollTop = Math.max(low, Math.min(list.scrollTop, at * ROW));
  drawRows();
  const record = records[shown[at]];
  const body = record.votes ? pair(record) : ranking(record);
  detail.replaceChildren(...heading(record), ...body, ...meta(record));
  detail.scrollTop = 0;
  clearTimeout(linking); // browsers refuse hundreds of these in a row, as from a key held down
  const link = `#${shown[at] + 1}`;
  linking = setTimeout(() => history.replaceState(null, "", link), 250);
}

// -- one record

function heading(record) {
  const { outcome, badge, words } = record.page;
  const place = [record.source, record.section].filter(Boolean).join(" / ");
  const turn = ({ role, content }) =>
    el("div", { class: "turn" }, role && el("h3", {}, role), textBox(content));
  return [
    el(
      "header", {}, el("h2", { class: "text" }, String(record.id)), span(`tag ${outcome}`, badge),
      place && span("soft", place), span("soft", words),
    ),
    el("h3", {}, "Query"),
    el("section", { class: "box" }, turns(record).map(turn)),
  ];
}

/** A response with what there is to remark about it: [[words, kind], ...]. */
function response(name, text, remarks, chosen) {
  const tags = remarks.map(([words, kind]) => span(`tag ${kind}`, words));
  const head = el("h3", {}, span("tag", name), tags);
  return el("section", { class: `box ${chosen ? "chosen" : ""}` }, head, textBox(text));
}

/** A vote with its thinking; names: of the two responses. */
function voteBox({ vote, swapped, thought, tokens, finish_reason: reason }, number, names, open) {
  const says = vote === null ? ["unreadable", "can’t be read"] : ["", `says ${names[vote - 1]}`];
  const facts = [`vote ${number}`, `shown ${(swapped ? [...names].reverse() : names).join(", ")}`];
  facts.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
  if (reason === "length") facts.push("ran into the token limit");
  return el(
    "details", { class: "box vote", open: open || found(thought) },
    el("summary", {}, span(`tag ${says[0]}`, says[1]), facts.map((fact) => span("soft", fact))),
    thought ? textBox(thought) : textBox("no thinking", "soft"),
  );
}

/** The votes; if there is much to read only the first is open. */
function votesList(votes, names) {
  const short = votes.reduce((sum, v) => sum + v.thought.length, 0) <= 4000;
  return votes.map((vote, i) => voteBox(vote, i + 1, names, short || i === 0));
}

function pair(record) {
  const card = (name, i) =>
    response(name, record[name], record.page.remarks[i], record.winner === i + 1);
  return [
    el("div", { class: "two" }, ["a", "b"].map(card)),
    el("h3", {}, record.votes.length ? "Thinking" : "No votes"),
    ...votesList(record.votes, ["a", "b"]),
  ];
}

function meta(record) {
  const said = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const line = ([key, value]) =>
    el("tr", {}, el("th", {}, key), el("td", { class: "text meta" }, said(value)));
  const entries = Object.entries(record.meta);
  return entries.length ? [el("h3", {}, "Also recorded"), el("table", {}, entries.map(line))] : [];
}

// -- controls

function onKey(event) {
  const { target, key } = event;
  const [list, search] = [$("list"), $("search")];
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (target === search) {
    if (key !== "Escape" && key !== "Enter") return;
    clearTimeout(searching);
    apply();
    list.focus();
    return event.preventDefault(); // Escape would empty the field
  }
  if (target.matches("input, select, textarea")) return;
  const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
  const moves = { j: 1, k: -1 };
  const free = target === document.body || target === list; // elsewhere arrows scroll
  if (free) Object.assign(moves, { ArrowDown: 1, ArrowUp: -1 });
  if (target === list) {
    Object.assign(moves, { PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 });
  }
  if (key in moves && shown.length) show(at + moves[key]);
  else if (key === "/") search.select();
  else return;
  event.preventDefault();
}

function fromHash() {
  const place = shown.indexOf(Number(location.hash.slice(1)) - 1);
  if (place >= 0 && place !== at) show(place);
}

if (records.length) {
  const wanted = location.hash;
  $("reader").hidden = false;
  $("filters").addEventListener("click", ({ target }) => {
    filter = target.closest("button")?.dataset.name ?? filter;
    apply();
  });
  $("section")?.addEventListener("change", apply);
  $("search").addEventListener("input", () => {
    clearTimeout(searching);
    searching = setTimeout(apply, 150);
  });
  $("list").addEventListener("scroll", () => requestAnimationFrame(drawRows));
  addEventListener("resize", drawRows);
  addEventListener("hashchange", fromHash);
  addEventListener("keydown", onKey);
  apply();
  if (/^#\d+$/.test(wanted)) {
    location.hash = wanted;
    fromHash();
    $("reader").scrollIntoView();
  }
}
