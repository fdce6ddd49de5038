// The page of `assay explore`. Whatever comes from the data reaches it as text: through textContent, never as markup.
"use strict";

const STEPS = 400;
const byId = (id) => document.getElementById(id);
const inDigits = new Intl.NumberFormat("en-US");
let facts = null; // what stays as it is
let cuts = []; // per score {on, keep, value}
let beside = null; // the score whose cut the rows lie beside; null: drawn rows
let counted = null; // the last answer
let asking = false;
let changed = false;
let waiting = 0;
let shows = 0;

function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  for (const child of children) element.append(child); // a string becomes a text node
  return element;
}

const rows = (count) => `${inDigits.format(count)} row${count === 1 ? "" : "s"}`;
const percent = (share) => {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  if (share < 1 && share > 0.999) return "> 99.9 %";
  return `${(100 * share).toFixed(1)} %`;
};
const short = (value) => Number(value.toPrecision(4)).toString().replace("-", "\u2212");
const SCALES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1];

async function get(question, query) {
  let answer;
  try {
    answer = await fetch(`${question}?${new URLSearchParams(query)}`);
  } catch {
    throw new Error("The program behind this page has ended. Start `assay explore` again and open its new address.");
  }
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer.json();
}

const asked = () => JSON.stringify(cuts.flatMap((cut, i) => (cut.on ? [[i, cut.keep, cut.value]] : [])));

function say(problem) {
  byId("problem").textContent = problem;
  byId("problem").hidden = !problem;
}

// ---- where a number lies on a chart, from 0 to 1, and back

function place(score, value) {
  const [low, high] = [score.edges[0], score.edges[score.edges.length - 1]];
  const at = score.logarithmic
    ? value > 0 ? Math.log(value / low) / Math.log(high / low) : 0
    : (value - low) / (high - low);
  return Math.min(Math.max(at, 0), 1);
}

function valueAt(score, at) {
  const [low, high] = [score.edges[0], score.edges[score.edges.length - 1]];
  if (score.logarithmic) return Number((low * (high / low) ** at).toPrecision(4));
  const value = low + at * (high - low);
  if (score.whole) return Math.round(value);
  const step = 10 ** Math.floor(Math.log10((high - low) / STEPS));
  return Number((Math.round(value / step) * step).toPrecision(12));
}

// ---- a score's card

function chart(score) {
  const drawing = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  drawing.setAttribute("viewBox", "0 0 1 1");
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("aria-hidden", "true");
  const most = Math.max(...score.counts, 1);
  const bars = ["all", "kept"].map((kind) => score.counts.map((count, i) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const [left, right] = [place(score, score.edges[i]), place(score, score.edges[i + 1])];
    bar.setAttribute("class", kind);
    bar.setAttribute("x", left);
    bar.setAttribute("width", Math.max(right - left, 0));
    drawing.append(bar);
    return bar;
  }));
  const set = (own, counts) => own.forEach((bar, i) => {
    bar.setAttribute("height", counts[i] / most);
    bar.setAttribute("y", 1 - counts[i] / most);
  });
  set(bars[0], score.counts);
  return [drawing, (counts) => set(bars[1], counts)];
}

function card(score, i) {
  const cut = cuts[i];
  const [drawing, draw] = chart(score);
  const line = make("div", { class: "cut" });
  const slider = make("input", { type: "range", min: 0, max: STEPS, step: 1, "aria-label": `cut at ${score.name}` });
  const use = make("input", { type: "checkbox" });
  const end = make("select", { "aria-label": `which side of the cut at ${score.name} is kept` },
    make("option", { value: "high" }, "at least"), make("option", { value: "low" }, "at most"));
  const number = make("input", { type: "number", step: "any", "aria-label": `the number to cut ${score.name} at` });
  const low = score.edges[0], high = score.edges[score.edges.length - 1];
  const middle = valueAt(score, 0.5);
  const axis = score.whole ? [Math.round(low + 0.5), Math.round(high - 0.5)] : [low, middle, high];
  const tails = [];
  if (score.below) tails.push(`${rows(score.below)} left of the chart, down to ${short(score.minimum)}`);
  if (score.above) tails.push(`${rows(score.above)} right of it, up to ${short(score.maximum)}`);
  if (score.logarithmic) tails.push("the scale is logarithmic");
  if (score.nan) tails.push(`${rows(score.nan)} without a number here, which a cut drops`);
  const element = make("article", { class: "card off" },
    make("h3", {}, score.name),
    make("p", { class: "quiet" }, [score.description, score.end].filter(Boolean).join(" — ")),
    make("div", { class: "chart" }, drawing, line),
    make("div", { class: "axis" }, ...axis.map((value) => make("span", {}, short(value)))),
    slider,
    make("div", { class: "controls" }, make("label", {}, use, "keep"), end, number),
    make("p", { class: "quiet" }, tails.join("; ")));
  element.lastChild.hidden = !tails.length;
  const show = () => {
    element.classList.toggle("off", !cut.on);
    use.checked = cut.on;
    end.value = cut.keep;
    slider.value = Math.round(STEPS * place(score, cut.value));
    slider.setAttribute("aria-valuetext", `${cut.on ? "" : "no cut, "}${cut.keep === "high" ? "at least" : "at most"} ${cut.value}`);
    if (document.activeElement !== number) number.value = cut.value;
    line.hidden = !cut.on;
    // A whole number's bar is kept or dropped as a whole: the line stands at its side.
    const side = score.whole ? (cut.keep === "high" ? -0.5 : 0.5) : 0;
    line.style.left = `${100 * place(score, cut.value + side)}%`;
  };
  const move = (change) => {
    Object.assign(cut, change);
    if (cut.on) beside = i;
    else if (beside === i) beside = cuts.findLastIndex((its) => its.on);
    show();
    refresh();
  };
  slider.addEventListener("input", () => move({ on: true, value: valueAt(score, slider.value / STEPS) }));
  use.addEventListener("change", () => move({ on: use.checked }));
  end.addEventListener("change", () => move({ on: true, keep: end.value }));
  number.addEventListener("input", () => {
    if (number.value !== "" && Number.isFinite(number.valueAsNumber)) move({ on: true, value: number.valueAsNumber });
  });
  number.addEventListener("blur", show);
  return { element, draw, show };
}

// ---- what is kept

function group(its) {
  const bars = its.rows.map(() => [make("div", {}), make("span", {}), make("td", { class: "count" }), make("td", {})]);
  const lines = its.names.map((name, i) => {
    const [bar, mark, count, share] = bars[i];
    const rest = i >= its.names.length - its.rest;
    return make("tr", rest ? { class: "rest" } : {}, make("th", { scope: "row", title: name }, make("bdi", {}, name)),
      count, share, make("td", {}, make("div", { class: "share" }, bar, mark)));
  });
  const element = make("article", { class: "card group" }, make("h3", {}, "by ", make("bdi", {}, its.column)),
    make("table", {}, make("tbody", {}, ...lines)));
  const show = (kept, all, scale) => kept.forEach((count, i) => {
    const own = its.rows[i] ? count / its.rows[i] : 0;
    const [bar, mark, cell, share] = bars[i];
    bar.style.width = `${100 * own / scale}%`;
    mark.style.left = `${100 * all / scale}%`;
    cell.textContent = `${inDigits.format(count)} of ${inDigits.format(its.rows[i])}`;
    share.textContent = percent(own);
  });
  return { element, show };
}

function showGroups(share) {
  const most = Math.max(share, ...facts.groups.flatMap((its, g) => its.rows.map((all, i) => (all ? counted.groups[g][i] / all : 0))));
  const scale = SCALES.find((step) => most <= step);
  byId("scale").textContent = `${100 * scale} %`;
  facts.groups.forEach((its, g) => its.card.show(counted.groups[g], share, scale));
}

function showCounts() {
  const share = facts.rows ? counted.kept / facts.rows : 0;
  byId("kept").replaceChildren(make("strong", {}, inDigits.format(counted.kept)),
    ` of ${rows(facts.rows)} kept (${percent(share)})`);
  const lacking = Object.entries(counted.lacking).map(([i, count]) => `${inDigits.format(count)} for ${facts.scores[i].name}`);
  if (lacking.length) byId("kept").append(make("span", { class: "quiet" }, ` — dropped without a number: ${lacking.join(", ")}`));
  byId("meter").firstElementChild.style.width = `${100 * share}%`;
  facts.scores.forEach((score, i) => score.card.draw(counted.bins[i]));
  showGroups(share);
  const any = cuts.some((cut) => cut.on);
  byId("command").textContent = counted.command || counted.why;
  byId("copy").disabled = !counted.command;
  byId("reset").disabled = !any;
}

// One question at a time; what changed meanwhile is asked next.
async function refresh() {
  changed = true;
  if (asking) return;
  asking = true;
  try {
    while (changed) {
      changed = false;
      counted = await get("count", { cuts: asked() });
      showCounts();
    }
    say("");
    clearTimeout(waiting);
    waiting = setTimeout(() => { waiting = 0; showRows(); }, 150);
  } catch (error) {
    say(error.message);
    byId("kept").textContent = "Not counted."; // rather than what another cut keeps
    byId("command").textContent = "";
    byId("copy").disabled = true;
  } finally {
    asking = false;
  }
}

// ---- rows

function sample(its) {
  const parts = [];
  const value = its.value === null ? [] : [make("span", { class: "value" }, its.value), "\u2002"];
  parts.push(make("div", {}, ...value, make("span", { class: "id" }, make("bdi", {}, its.name))));
  for (const [column, source] of its.pictures) {
    parts.push(make("div", { class: "column" }, column));
    if (source.startsWith("data:image/jpeg;base64,")) parts.push(make("img", { src: source, alt: "" }));
  }
  for (const [column, text] of its.texts) {
    parts.push(make("div", { class: "column" }, column), make("div", { class: "text", dir: "auto" }, text));
  }
  if (its.fault) parts.push(make("p", { class: "quiet" }, `Not shown: ${its.fault}`));
  if (its.scores.length) {
    const others = its.scores.map(([name, number]) => `${name}  ${number}`).join("\n");
    parts.push(make("details", { class: "column" }, make("summary", {}, "its other scores"),
      make("div", { class: "text" }, others)));
  }
  return make("div", { class: "sample" }, ...parts);
}

async function showRows() {
  const turn = ++shows;
  const on = cuts.flatMap((cut, i) => (cut.on ? [i] : []));
  const at = on.includes(beside) ? beside : null;
  const before = asked();
  try {
    const found = await get("near", at === null ? { cuts: before } : { cuts: before, at });
    if (before !== asked() || turn !== shows) return; // others have been asked for meanwhile
    byId("kept-rows").replaceChildren(...found.kept.map(sample));
    byId("dropped-rows").replaceChildren(...found.dropped.map(sample));
    for (const id of ["kept-rows", "dropped-rows"]) {
      if (!byId(id).children.length) byId(id).append(make("p", { class: "quiet" }, "No such row."));
    }
    byId("beside").textContent = at === null
      ? "Rows drawn at random. With a cut, the rows nearest to it on either side are here."
      : `The rows nearest to the cut at ${facts.scores[at].name} on either side, nearest first; they pass all other cuts. ` +
        "If you would keep the ones and drop the others, the cut is in the right place.";
    byId("which").replaceChildren(...(on.length > 1 ? on : []).map((i) => {
      const button = make("button", { type: "button", "aria-pressed": i === at }, facts.scores[i].name);
      button.addEventListener("click", () => { beside = i; showRows(); });
      return button;
    }));
  } catch (error) {
    say(error.message);
  }
}

async function copy() {
  const text = counted.command;
  try {
    await navigator.clipboard.writeText(text);
    byId("copy").textContent = "Copied";
  } catch {
    byId("command-box").open = true;
    getSelection().selectAllChildren(byId("command"));
    byId("copy").textContent = "Selected: now press Ctrl-C";
  }
  byId("command-box").open = true;
  setTimeout(() => { byId("copy").textContent = "Copy the command"; }, 2500);
}

async function start() {
  try {
    facts = await get("facts", {});
  } catch (error) {
    say(error.message);
    return;
  }
  byId("corpus").textContent = facts.corpus;
  document.title = `Scores of ${facts.corpus}`;
  cuts = facts.scores.map((score) => ({
    on: false, keep: score.keep === "low" ? "low" : "high", value: valueAt(score, place(score, score.median)),
  }));
  facts.scores.forEach((score, i) => {
    score.card = card(score, i);
    score.card.show();
    byId("cards").append(score.card.element);
  });
  if (!facts.scores.length) byId("cards").append(make("p", {}, "No score here tells one row from another."));
  facts.groups.forEach((its) => {
    its.card = group(its);
    byId("groups").append(its.card.element);
  });
  const others = [];
  if (facts.others.length) others.push(`Not to be cut at (one number for all rows, or several per row): ${facts.others.join(", ")}.`);
  if (facts.skipped.length) others.push(`Not on this page: ${facts.skipped.join(", ")}. --by chooses scores.`);
  if (facts.not_grouped.length) others.push(`Not grouped by: ${facts.not_grouped.join("; ")}.`);
  if (facts.quarantined) others.push(`${rows(facts.quarantined)} in quarantine could not be scored; no cut can keep them.`);
  byId("others").textContent = others.join(" ");
  byId("others").hidden = !others.length;
  byId("composition").hidden = !facts.groups.length;
  byId("copy").addEventListener("click", copy);
  byId("reset").addEventListener("click", () => {
    cuts.forEach((cut) => { cut.on = false; });
    beside = null;
    facts.scores.forEach((score) => score.card.show());
    refresh();
  });
  refresh();
}

start();
