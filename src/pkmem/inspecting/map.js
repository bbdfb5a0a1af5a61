// The map: a picture with a dot for each slot, what its colours mean, and the slot under pointer or keys.

const ramp = [
  [68, 1, 84],
  [59, 82, 139],
  [33, 145, 140],
  [94, 201, 98],
  [253, 231, 37],
];
const fewer = [197, 74, 20];
const more = [22, 98, 186];
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const deadColour = () => (isDark() ? [48, 49, 54] : [228, 229, 233]);
const restColour = () => (isDark() ? [70, 92, 118] : [190, 205, 222]);
const loudColour = () => (isDark() ? [255, 138, 92] : [190, 50, 20]);

const view = { counts: null, picture: document.createElement("canvas"), zoom: 1, row: 0, column: 0 };

function between(stops, share) {
  const place = Math.min(1, Math.max(0, share)) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(place));
  return stops[low].map((from, i) => from + (stops[low + 1][i] - from) * (place - low));
}

const css = (colour) => `rgb(${colour.map(Math.round).join(" ")})`;

/** Counts of each slot, of one head or of all together. */
function countsOf(table, memory, head) {
  const { numSlots, heads } = facts.memories[memory];
  if (head >= 0) return table.subarray(head * numSlots, (head + 1) * numSlots);
  const sum = new Uint32Array(numSlots);
  for (let i = 0, place = 0; i < heads; i++) for (let slot = 0; slot < numSlots; slot++) sum[slot] += table[place++];
  return sum;
}

/** What the map shows: a colour of each slot, and the legend. */
function scaleOf(show, counts) {
  const most = counts.reads.reduce((a, b) => Math.max(a, b), 0);
  const numDead = counts.reads.reduce((sum, reads) => sum + (reads === 0), 0);
  const share = percent(numDead / counts.reads.length);
  if (show === "dead") {
    return {
      colour: (slot) => (counts.reads[slot] ? restColour() : loudColour()),
      swatches: [
        [loudColour(), `never read: ${counted.format(numDead)} slots (${share})`],
        [restColour(), `read: ${counted.format(counts.reads.length - numDead)} slots`],
      ],
    };
  }
  if (show === "change") {
    const change = Float64Array.from(counts.reads, (reads, slot) => Math.log2((counts.compared[slot] + 1) / (reads + 1)));
    const far = change.reduce((a, b) => Math.max(a, Math.abs(b)), 0) || 1;
    const middle = isDark() ? [40, 41, 46] : [244, 244, 246];
    const stops = [isDark() ? [255, 150, 100] : fewer, middle, isDark() ? [120, 190, 255] : more];
    const gone = counts.reads.reduce((sum, reads, slot) => sum + (reads > 0 && counts.compared[slot] === 0), 0);
    const come = counts.reads.reduce((sum, reads, slot) => sum + (reads === 0 && counts.compared[slot] > 0), 0);
    return {
      colour: (slot) => between(stops, 0.5 + change[slot] / far / 2),
      stops,
      ticks: [
        [0, `\u00f7 ${counted.format(Math.round(10 * 2 ** far) / 10)}`],
        [0.5, "as many"],
        [1, `\u00d7 ${counted.format(Math.round(10 * 2 ** far) / 10)}`],
      ],
      about: "reads in the compared model, plus 1, over those here, plus 1",
      swatches: [
        [null, `Read here alone: ${counted.format(gone)} slots; in the compared model alone: ${counted.format(come)}.`],
        [null, "Colours: reads in the compared model, plus 1, over those here, plus 1; logarithmic."],
      ],
    };
  }
  const top = Math.log(Math.max(most, 2));
  const dead = deadColour();
  const lookup = Array.from({ length: 256 }, (_, i) => between(ramp, i / 255));
  const colour = (slot) => {
    const reads = counts.reads[slot];
    return reads ? lookup[Math.round((255 * Math.log(reads)) / top)] : dead;
  };
  const ticks = [[0, "1"]];
  for (let tick = 10; tick < most / 1.8; tick *= 10) ticks.push([Math.log(tick) / top, counted.format(tick)]);
  if (most > 1) ticks.push([Math.log(most) / top, counted.format(most)]);
  const sparse = ticks.length > 5 ? ticks.filter((_, i) => i % 2 === 0 || i === ticks.length - 1) : ticks;
  const what = show === "top1" ? "never a head's best" : "never read";
  return { colour, stops: ramp, ticks: sparse, swatches: [[dead, `${what}: ${counted.format(numDead)} slots (${share})`]] };
}

/** Paints the picture of all slots and the legend. */
function paint() {
  const { side } = facts.memories[state.memory];
  const scale = scaleOf(state.show, view.counts);
  view.picture.width = view.picture.height = side;
  const context = view.picture.getContext("2d");
  const image = context.createImageData(side, side);
  for (let slot = 0, place = 0; slot < side * side; slot++) {
    const colour = scale.colour(slot);
    image.data[place++] = colour[0];
    image.data[place++] = colour[1];
    image.data[place++] = colour[2];
    image.data[place++] = 255;
  }
  context.putImageData(image, 0, 0);
  at("legend").hidden = !scale.stops;
  at("ticks").replaceChildren();
  if (scale.stops) {
    const bar = at("ramp");
    bar.width = 256;
    bar.height = 1;
    const line = bar.getContext("2d");
    for (let i = 0; i < 256; i++) {
      line.fillStyle = css(between(scale.stops, i / 255));
      line.fillRect(i, 0, 1, 1);
    }
    for (const [place, text] of scale.ticks) {
      const tick = make("span", {}, text);
      tick.style.left = `${100 * place}%`;
      at("ticks").append(tick);
    }
    const words = scale.about || "reads of a slot, on a logarithmic scale";
    at("legend").setAttribute("aria-label", `Colours from ${scale.ticks.map(([, text]) => text).join(", ")}: ${words}`);
  }
  at("swatches").replaceChildren(
    ...scale.swatches.map(([colour, text]) => {
      if (colour === null) return make("span", { class: "swatch" }, text);
      const box = make("i", { "aria-hidden": "true" });
      box.style.background = css(colour);
      return make("span", { class: "swatch" }, box, text);
    }),
  );
  draw();
}

/** Slots that a side of the window onto the map shows. */
const span = () => Math.max(1, Math.ceil(facts.memories[state.memory].side / view.zoom));

/** Draws the window onto the picture, and the frame of the chosen slot. */
function draw() {
  const canvas = at("map");
  const size = Math.round(canvas.clientWidth * devicePixelRatio);
  if (canvas.width !== size) canvas.width = canvas.height = size;
  const { side } = facts.memories[state.memory];
  const shown = span();
  view.row = Math.min(Math.max(0, view.row), side - shown);
  view.column = Math.min(Math.max(0, view.column), side - shown);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = shown > size;
  context.drawImage(view.picture, view.column, view.row, shown, shown, 0, 0, size, size);
  if (state.slot === null) return;
  const dot = size / shown;
  const frame = Math.max(dot, 9 * devicePixelRatio);
  const x = ((state.slot % side) - view.column + 0.5) * dot - frame / 2;
  const y = (Math.floor(state.slot / side) - view.row + 0.5) * dot - frame / 2;
  for (const [colour, width] of [["#000", 4], ["#fff", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = width * devicePixelRatio;
    context.strokeRect(x, y, frame, frame);
  }
}

/** Moves the window so that the chosen slot is in it. */
function follow() {
  if (state.slot === null) return;
  const { side } = facts.memories[state.memory];
  const shown = span();
  const [row, column] = [Math.floor(state.slot / side), state.slot % side];
  if (row < view.row || row >= view.row + shown) view.row = row - (shown >> 1);
  if (column < view.column || column >= view.column + shown) view.column = column - (shown >> 1);
}

function zoomTo(zoom) {
  const { side } = facts.memories[state.memory];
  const shown = span();
  const chosen = state.slot === null ? null : [Math.floor(state.slot / side), state.slot % side];
  const [row, column] = chosen || [view.row + shown / 2, view.column + shown / 2];
  view.zoom = Math.min(Math.max(1, zoom), Math.max(1, side / 4));
  view.row = Math.round(row - span() / 2);
  view.column = Math.round(column - span() / 2);
  draw();
}

/** A slot's name: its number and, where keys are products, its pair. */
function nameOf(memory, slot) {
  const { side, isFlat } = facts.memories[memory];
  return isFlat ? counted.format(slot) : `${counted.format(slot)} (${Math.floor(slot / side)}, ${slot % side})`;
}

function slotUnder(event) {
  const box = at("map").getBoundingClientRect();
  const shown = span();
  const inside = (place, length) => Math.min(shown - 1, Math.max(0, Math.floor((place / length) * shown)));
  const row = view.row + inside(event.clientY - box.top, box.height);
  return row * facts.memories[state.memory].side + view.column + inside(event.clientX - box.left, box.width);
}

/** Says what the map shows of a slot. */
function tell(slot) {
  if (slot === null || !view.counts) return;
  const { reads, top1, compared } = view.counts;
  const what = { top1: "reads as a head's best", compared: "reads in the compared model" }[state.show] || "reads";
  const best = top1 ? `, ${counted.format(top1[slot])} as a head's best` : "";
  const there = compared ? `; ${counted.format(compared[slot])} in the compared model` : "";
  at("under").textContent = `Slot ${nameOf(state.memory, slot)}: ${counted.format(reads[slot])} ${what}${best}${there}`;
}
