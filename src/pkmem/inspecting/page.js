// The page: what a choice changes, and the address that keeps it.

/** Numbers of an address such as #memory=0&slot=123 that are in range; the rest is left as it is. */
function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const number = (name, below) => {
    const value = given.get(name);
    return value !== null && /^\d+$/.test(value) && Number(value) < below ? Number(value) : null;
  };
  const change = { memory: number("memory", facts.memories.length) ?? state.memory };
  const { heads, numSlots } = facts.memories[change.memory];
  change.head = number("head", heads) ?? -1;
  if (given.get("show") in shows) change.show = given.get("show");
  change.slot = number("slot", numSlots);
  change.token = number("token", 2 ** 32);
  const position = number("at", facts.numTokens);
  if (position !== null) change.position = position;
  else change.text = number("text", facts.numTexts) ?? state.text;
  return change;
}

function toAddress() {
  const { memory, head, show, slot, token, text, at: position } = state;
  const parts = { memory, head: head < 0 ? null : head, show, slot, token, text, at: position };
  const given = Object.entries(parts).filter(([, value]) => value !== null);
  history.replaceState(null, "", `#${new URLSearchParams(given)}`);
}

/** Shows what a change of the state asks for; `position` is a token of the texts. */
async function choose(change) {
  const before = { ...state };
  if ("position" in change) {
    const ends = await load("ends");
    Object.assign(state, { text: lastUpTo(ends, change.position) + 1, at: change.position });
  }
  delete change.position;
  Object.assign(state, change);
  const changed = (...names) => names.some((name) => state[name] !== before[name]);
  const { heads, numSlots } = facts.memories[state.memory];
  if (changed("memory")) {
    if (state.head >= heads) state.head = -1;
    if (state.slot !== null && state.slot >= numSlots) state.slot = null;
    Object.assign(view, { zoom: 1, row: 0, column: 0 });
    fillChoices();
  }
  if (changed("text") && !(state.at !== null && changed("at"))) state.at = null;
  toAddress();
  for (const name of ["memory", "head", "show"]) at(name).value = String(state[name]);
  at("number").value = state.slot ?? "";
  follow();
  if (changed("memory", "head", "show") || view.counts === null) {
    await loadCounts();
    paint();
    showFigures();
  } else if (changed("slot")) draw();
  tell(state.slot);
  if (changed("slot", "memory", "head", "show")) at("said").textContent = state.slot === null ? "" : at("under").textContent;
  const tasks = [];
  if (changed("memory", "slot") || !at("slot").firstChild) tasks.push(showSlot());
  if (changed("memory", "token")) tasks.push(showToken());
  if (changed("text")) tasks.push(showText());
  await Promise.all(tasks);
  if (facts.numTokens && changed("memory", "slot", "text", "at")) await showReads(changed("at", "text"));
}

async function loadCounts() {
  const { memory, head, show } = state;
  const { reads, top1 } = await loadOf(memory, ["reads", "top1"]);
  const counts = { reads: countsOf(reads, memory, head), top1: countsOf(top1, memory, head) };
  if (facts.compared !== null) {
    const { compared } = await loadOf(memory, ["compared"]);
    counts.compared = countsOf(compared, memory, head);
  }
  view.counts = counts;
  if (show === "top1") view.counts = { reads: counts.top1 };
  if (show === "compared") view.counts = { reads: counts.compared };
}

function fillChoices() {
  const option = (value, text) => make("option", { value: String(value) }, text);
  const { heads, numSlots, isFlat } = facts.memories[state.memory];
  at("memory").replaceChildren(...facts.memories.map((memory, i) => option(i, memory.name)));
  at("head").replaceChildren(option(-1, "all"), ...Array.from({ length: heads }, (_, head) => option(head, String(head))));
  at("show").replaceChildren(...Object.entries(shows).map(([value, text]) => option(value, text)));
  at("number").max = numSlots - 1;
  const pairs = isFlat
    ? "Keys are flat here: slots stand row by row, and a row means nothing."
    : "Slot (i, j) is the pair of sub-keys i, down, and j, across.";
  at("map-help").textContent = `${pairs} Click a slot, or move with the arrow keys; + and - zoom.`;
}

function about() {
  at("model").textContent = visible(facts.model, false);
  const compared = facts.compared === null ? [] : [" Compared with ", make("bdi", {}, visible(facts.compared, false)), "."];
  at("about").replaceChildren(
    `What ${facts.memories.length === 1 ? "its memory reads" : "its memories read"} on ${counted.format(facts.numTokens)} held-out tokens of `,
    make("bdi", {}, visible(facts.data, false)),
    `, in texts of the model's context, ${counted.format(facts.numTexts)} in all.`,
    ...compared,
    ...facts.memories.map((memory) =>
      make(
        "span",
        { class: "memory" },
        make("strong", {}, memory.name),
        ` at ${memory.place}: ${counted.format(memory.numSlots)} slots, ${memory.heads} heads \u00d7 ${memory.knn} neighbours, ` +
          `values ${memory.values}${memory.isExperts ? ", each the output weight of an expert of one neuron" : ""}`,
      ),
    ),
  );
}

function move(event) {
  const { side, numSlots } = facts.memories[state.memory];
  const steps = { ArrowUp: -side, ArrowDown: side, ArrowLeft: -1, ArrowRight: 1 };
  if (event.key === "+" || event.key === "=") zoomTo(view.zoom * 2);
  else if (event.key === "-") zoomTo(view.zoom / 2);
  else if (event.key in steps && !event.altKey && !event.ctrlKey && !event.metaKey) {
    const slot = state.slot === null ? view.row * side + view.column : state.slot + steps[event.key];
    const leavesRow = Math.abs(steps[event.key]) === 1 && state.slot !== null && Math.floor(slot / side) !== Math.floor(state.slot / side);
    if (slot >= 0 && slot < numSlots && !(leavesRow && side > 1)) choose({ slot });
  } else return;
  event.preventDefault();
}

async function moveInText(event) {
  const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
  if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const ends = await load("ends");
  const first = state.text ? ends[state.text - 1] : 0;
  const position = state.at === null ? first : state.at + steps[event.key];
  if (position >= first && position < ends[state.text]) choose({ position });
}

function listen() {
  for (const name of ["memory", "head"]) at(name).onchange = () => choose({ [name]: Number(at(name).value) });
  at("show").onchange = () => choose({ show: at("show").value });
  const map = at("map");
  map.addEventListener("click", (event) => choose({ slot: slotUnder(event) }));
  map.addEventListener("pointermove", (event) => tell(slotUnder(event)));
  map.addEventListener("pointerleave", () => tell(state.slot));
  map.addEventListener("keydown", move);
  at("closer").onclick = () => zoomTo(view.zoom * 2);
  at("farther").onclick = () => zoomTo(view.zoom / 2);
  at("number").onchange = () => {
    const { value, max } = at("number");
    if (/^\d+$/.test(value) && Number(value) <= Number(max)) choose({ slot: Number(value) });
  };
  at("hottest").onclick = () => choose({ slot: view.counts.reads.reduce((best, reads, slot, all) => (reads > all[best] ? slot : best), 0) });
  at("token-search").oninput = searchTokens;
  at("text-search").oninput = searchTexts;
  const goTo = (text) => text >= 0 && text < facts.numTexts && choose({ text, at: null });
  at("before").onclick = () => goTo(state.text - 1);
  at("behind").onclick = () => goTo(state.text + 1);
  at("text-number").onchange = () => goTo(Math.floor(Number(at("text-number").value)) - 1);
  at("text").addEventListener("click", (event) => {
    if (event.target.dataset.at) choose({ position: Number(event.target.dataset.at) });
  });
  at("text").addEventListener("keydown", moveInText);
  addEventListener("hashchange", () => choose(fromAddress()));
  new ResizeObserver(() => view.counts && draw()).observe(map);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint());
}

async function start() {
  about();
  fillChoices();
  listen();
  await choose(fromAddress());
  performance.mark("drawn");
  if (facts.numTokens) {
    await Promise.all([showText(), showToken()]);
    await showReads(false);
  }
  // what the first click asks for, then the rest, before it is asked for
  const soon = OF_A_SLOT.map((name) => `${facts.memories[state.memory].name}.${name}`);
  for (const name of ["vocabulary", ...soon]) if (name in facts.blocks) await load(name);
  document.body.dataset.ready = "yes";
  for (const name of Object.keys(facts.blocks)) await load(name);
}

addEventListener("unhandledrejection", ({ reason }) => {
  at("trouble").hidden = false;
  at("trouble").textContent = `Something went wrong (${reason.message}): write the page again, or open it in a browser of 2023 or later.`;
});
start();
