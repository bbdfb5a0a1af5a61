// What stands beside the map: a slot, a token of the vocabulary, a text; and the state that the address keeps.

const state = { memory: 0, head: -1, show: "reads", slot: null, token: null, text: 0, at: null };
const shows = { reads: "reads", top1: "top-1 reads", dead: "dead slots" };
if (facts.compared !== null) Object.assign(shows, { compared: "reads, compared model", change: "change to compared model" });
const MATCHES = 20;
const BEFORE = 16;
const BEHIND = 12;

const headNames = (bits) => headsOf(bits).join(", ");
const headWords = (bits) => `${headsOf(bits).length > 1 ? "heads" : "head"} ${headNames(bits)}`;
const weightText = (weight) => {
  if (weight >= 100) return counted.format(Math.round(weight));
  return weight >= 0.001 ? weight.toPrecision(2) : weight.toExponential(1);
};
const words = () => load("vocabulary");

function slotLink(slot) {
  return make("a", { href: "#", "data-slot": slot, onclick: chooseLinked }, nameOf(state.memory, slot));
}

function chooseLinked(event) {
  event.preventDefault();
  choose({ slot: Number(event.currentTarget.dataset.slot) });
}

function table(heads, rows) {
  return make(
    "div",
    { class: "wide", tabindex: "0", role: "region", "aria-label": heads.join(", ") },
    make(
      "table",
      {},
      make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell))))),
    ),
  );
}

function showFigures() {
  const memory = facts.memories[state.memory];
  const names = [...Array.from({ length: memory.heads }, (_, head) => `head ${head}`), "all heads"];
  const [rows, chosen] = [[], []];
  for (const i of [memory.heads, ...Array(memory.heads).keys()]) {
    const of = [[names[i], memory.figures[i]]];
    if (memory.compared) of.push([`\u2007compared`, memory.compared[i]]);
    for (const [name, figures] of of) {
      if (i === (state.head < 0 ? memory.heads : state.head)) chosen.push(rows.length);
      rows.push([
        name,
        counted.format(figures.reads),
        percent(figures.usage),
        percent(figures.top1_usage),
        figures.kl === null ? "none" : figures.kl.toFixed(3),
        counted.format(figures.dead_slots),
        percent(figures.hottest_share),
      ]);
    }
  }
  const shown = table(["", "reads", "usage", "top-1 usage", "KL", "dead slots", "hottest 1 %"], rows);
  shown.querySelectorAll("tbody tr").forEach((row, i) => row.classList.toggle("chosen", chosen.includes(i)));
  at("figures").replaceChildren(shown.firstChild);
}

/** A stretch of a text around a position: what stood before, the token marked, what comes next. */
async function stretch(position) {
  const [tokens, ends, vocabulary] = await Promise.all([load("tokens"), load("ends"), words()]);
  const text = lastUpTo(ends, position) + 1;
  const first = text ? ends[text - 1] : 0;
  const from = Math.max(first, position - BEFORE);
  const to = Math.min(ends[text], position + 1 + BEHIND);
  const join = (a, b) => visible(Array.from(tokens.subarray(a, b), (token) => vocabulary[token]).join(""), false);
  return make(
    "span",
    { class: "stretch" },
    make("bdi", {}, (from > first ? "\u2026" : "") + join(from, position)),
    make("mark", {}, join(position, position + 1) || "\u2205"),
    make("bdi", { class: "next" }, join(position + 1, to) + (to < ends[text] ? "\u2026" : "")),
  );
}

const OF_A_SLOT = ["slots", "weight", "tokensFor", "tokensAgainst", "deviations", "contextAt", "contextWeights", "contextHeads"];

async function showSlot() {
  const { slot, memory: number } = state;
  if (slot === null) {
    at("slot").replaceChildren(make("p", { class: "help" }, "Choose a slot on the map: click, or use the arrow keys there."));
    return;
  }
  const memory = facts.memories[number];
  const { reads, top1, weight, slots } = await loadOf(number, ["reads", "top1", "weight", "slots"]);
  const ofHead = (of, head) => of[head * memory.numSlots + slot];
  const heads = [...Array(memory.heads).keys()];
  const total = heads.reduce((sum, head) => sum + ofHead(reads, head), 0);
  const parts = [make("p", {}, make("strong", {}, `Slot ${nameOf(number, slot)} of ${memory.name}`))];
  const best = heads.reduce((sum, head) => sum + ofHead(top1, head), 0);
  parts.push(
    make(
      "p",
      {},
      total
        ? `${counted.format(total)} reads, ${counted.format(best)} as a head's best; weight of a read ${weightText(weight[slot] / total)} on average.`
        : "Dead: no token of the texts reads it.",
    ),
  );
  if (total) {
    parts.push(make("h3", {}, "Heads that read it"));
    const most = Math.max(...heads.map((head) => ofHead(reads, head)));
    for (const head of heads) {
      const bar = make("i", { "aria-hidden": "true" });
      bar.style.width = `${(100 * ofHead(reads, head)) / most}%`;
      parts.push(
        make(
          "div",
          { class: "bar" },
          make("span", {}, `head ${head}`),
          make("span", { class: "track" }, bar),
          make("span", {}, `${counted.format(ofHead(reads, head))} (best ${counted.format(ofHead(top1, head))})`),
        ),
      );
    }
    const place = placeIn(slots, slot);
    if (place < 0) {
      parts.push(make("p", {}, `This page has contexts and tokens of the ${counted.format(slots.length)} slots read most.`));
    } else {
      parts.push(...(await valueOf(number, place)), ...(await contextsOf(number, place)));
    }
  }
  if (state.slot === slot && state.memory === number) at("slot").replaceChildren(...parts);
}

async function valueOf(number, place) {
  const memory = facts.memories[number];
  const title = make("h3", {}, "What its value says");
  if (memory.notProjected) return [title, make("p", {}, memory.notProjected)];
  const names = ["tokensFor", "tokensAgainst", "deviations"];
  const [found, vocabulary] = [await loadOf(number, names), await words()];
  if (found.deviations[place] === 0) return [title, make("p", {}, "Nothing: it makes all tokens alike, as zeros do.")];
  const most = facts.blocks[`${memory.name}.tokensFor`][1][1];
  const chips = (tokens) =>
    make(
      "span",
      { class: "chips" },
      ...Array.from(tokens.subarray(place * most, (place + 1) * most), (token) =>
        make("code", {}, visible(vocabulary[token], false) || "\u2205"),
      ),
    );
  const expert = memory.isExperts
    ? " The slot is an expert of one neuron: this is its output weight, which the neuron's activation scales beside the weight of its key."
    : "";
  return [
    title,
    make("p", {}, make("span", { class: "side" }, "for "), chips(found.tokensFor)),
    make("p", {}, make("span", { class: "side" }, "against "), chips(found.tokensAgainst)),
    make(
      "p",
      { class: "help" },
      `The first stands ${found.deviations[place].toFixed(1)} standard deviations above the mean of all tokens. The value is ` +
        `projected by the output embedding as it is, without the decoder's final norm and what later layers make of it.${expert}`,
    ),
  ];
}

async function contextsOf(number, place) {
  const memory = facts.memories[number];
  const found = await loadOf(number, ["contextAt", "contextWeights", "contextHeads"]);
  const items = [];
  for (let i = place * memory.numContexts; i < (place + 1) * memory.numContexts; i++) {
    const position = found.contextAt[i];
    if (position >= facts.numTokens) break;
    const open = make("button", { type: "button", onclick: () => choose({ position }) }, "open text");
    const about = `weight ${weightText(found.contextWeights[i])}, ${headWords(found.contextHeads[i])} `;
    items.push(make("li", {}, await stretch(position), make("span", { class: "about" }, about, open)));
  }
  const title = make("h3", {}, "Tokens that read it most strongly");
  return [title, make("p", { class: "help" }, "The token is marked; what comes next stands behind it."), make("ol", {}, ...items)];
}

async function showToken() {
  const { token, memory: number } = state;
  if (token === null) return at("token").replaceChildren();
  const memory = facts.memories[number];
  const names = ["Weight", "Count"].flatMap((order) => ["Slots", "Weights", "Counts"].map((what) => `by${order}${what}`));
  const [found, types, vocabulary] = await Promise.all([loadOf(number, names), load("types"), words()]);
  const place = placeIn(types, token);
  if (place < 0) return at("token").replaceChildren();
  const rowsBy = (order) => {
    const rows = [];
    for (let i = place * memory.numOfTokens; i < (place + 1) * memory.numOfTokens; i++) {
      const slot = found[`by${order}Slots`][i];
      if (slot >= memory.numSlots) break;
      rows.push([slotLink(slot), weightText(found[`by${order}Weights`][i]), counted.format(found[`by${order}Counts`][i])]);
    }
    return table(["slot", "weight", "times"], rows);
  };
  at("token").replaceChildren(
    make("p", {}, "Slots that ", make("code", {}, visible(vocabulary[token], false) || "\u2205"), ` reads in ${memory.name}:`),
    make(
      "div",
      { class: "beside" },
      make("div", {}, make("h3", {}, "by weight given, all together"), rowsBy("Weight")),
      make("div", {}, make("h3", {}, "by times read"), rowsBy("Count")),
    ),
  );
  return undefined;
}

let occurrences = null;
async function countTypes() {
  const [tokens, types] = await Promise.all([load("tokens"), load("types")]);
  const counts = new Map(Array.from(types, (type) => [type, 0]));
  for (const token of tokens) counts.set(token, counts.get(token) + 1);
  occurrences = [...counts].sort((a, b) => b[1] - a[1]);
}

async function searchTokens() {
  if (occurrences === null) await countTypes();
  const vocabulary = await words();
  const wanted = at("token-search").value;
  const holds = (text) => text.toLowerCase().includes(wanted.toLowerCase());
  const found = wanted ? occurrences.filter(([type]) => holds(vocabulary[type])) : [];
  const exact = (type) => Number(vocabulary[type].trim().toLowerCase() === wanted.trim().toLowerCase());
  found.sort((a, b) => exact(b[0]) - exact(a[0]));
  listMatches(
    "token-matches",
    found.length,
    wanted,
    found.slice(0, MATCHES).map(([type, times]) => {
      const text = `${visible(vocabulary[type], false)} \u00d7${counted.format(times)}`;
      return make("button", { type: "button", onclick: () => choose({ token: type }) }, text);
    }),
  );
}

function listMatches(id, number, wanted, buttons) {
  const about = number > buttons.length ? `${counted.format(number)} found, the first ${buttons.length}:` : `${number} found`;
  at(id).replaceChildren(...(wanted ? [make("span", { class: "help" }, about), ...buttons] : []));
}

let joined = null;
/** Each text as one string, in small letters, and where in it each token begins. */
async function joinTexts() {
  const [tokens, ends, vocabulary] = await Promise.all([load("tokens"), load("ends"), words()]);
  const small = vocabulary.map((word) => word.toLowerCase());
  joined = Array.from(ends, (end, i) => {
    const starts = [];
    let text = "";
    for (let position = i ? ends[i - 1] : 0; position < end; position++) {
      starts.push(text.length);
      text += small[tokens[position]];
    }
    return { text, starts, first: i ? ends[i - 1] : 0 };
  });
}

async function searchTexts() {
  if (joined === null) await joinTexts();
  const wanted = at("text-search").value.toLowerCase();
  const positions = [];
  for (const { text, starts, first } of wanted ? joined : []) {
    for (let place = text.indexOf(wanted); place >= 0; place = text.indexOf(wanted, place + wanted.length)) {
      positions.push(first + lastUpTo(starts, place));
    }
  }
  const buttons = positions.slice(0, MATCHES).map(async (position) => {
    return make("button", { type: "button", class: "long", onclick: () => choose({ position }) }, await stretch(position));
  });
  listMatches("text-matches", positions.length, wanted, await Promise.all(buttons));
}

async function showText() {
  const [tokens, ends, vocabulary] = await Promise.all([load("tokens"), load("ends"), words()]);
  const { text } = state;
  at("text-number").value = text + 1;
  at("text-number").max = facts.numTexts;
  at("text-count").textContent = `of ${counted.format(facts.numTexts)}`;
  const first = text ? ends[text - 1] : 0;
  const shown = Array.from(tokens.subarray(first, ends[text]), (token, i) =>
    make("span", { "data-at": first + i }, visible(vocabulary[token], true) || "\u2205"),
  );
  at("text").replaceChildren(...shown);
}

/** Marks the chosen token of the text and those that read the chosen slot, and lists what the chosen one reads. */
async function showReads(follows) {
  const { memory: number, slot } = state;
  const memory = facts.memories[number];
  const found = await loadOf(number, ["readSlots", "readWeights", "readHeads"]);
  const num = memory.numReads;
  for (const token of at("text").children) {
    const place = Number(token.dataset.at);
    const reads = slot !== null && found.readSlots.subarray(place * num, (place + 1) * num).includes(slot);
    token.className = [reads ? "reader" : "", place === state.at ? "chosen" : ""].join(" ").trim();
    if (place === state.at && follows) token.scrollIntoView({ block: "nearest" });
  }
  if (state.at === null) {
    const help = "Choose a token below: click, or use the arrow keys there. Underlined are those that read the chosen slot.";
    at("reads").replaceChildren(make("p", { class: "help" }, help));
    return;
  }
  const [tokens, vocabulary] = await Promise.all([load("tokens"), words()]);
  const rows = [];
  for (let i = state.at * num; i < Math.min(found.readSlots.length, (state.at + 1) * num); i++) {
    if (found.readSlots[i] >= memory.numSlots) break;
    rows.push([slotLink(found.readSlots[i]), weightText(found.readWeights[i]), headNames(found.readHeads[i])]);
  }
  const kept = found.readSlots.length / num;
  const token = tokens[state.at];
  const first = rows.length ? `: slot ${nameOf(number, found.readSlots[state.at * num])}` : "";
  if (follows) at("said").textContent = visible(vocabulary[token], false) + first;
  const what =
    state.at < kept
      ? `reads in ${memory.name}; of up to ${memory.heads * memory.knn} reads this page keeps the ${num} of largest weight. Fewer tokens (--max_tokens) leave room for more.`
      : `: this page keeps the reads of the first ${counted.format(kept)} tokens; read fewer (--max_tokens) to have all.`;
  at("reads").replaceChildren(
    make("p", {}, make("code", {}, visible(vocabulary[token], false) || "\u2205"), ` ${what} `,
      make("button", { type: "button", onclick: () => choose({ token }) }, "all slots of this token")),
    ...(rows.length ? [table(["slot", "weight", "heads"], rows)] : []),
  );
}
