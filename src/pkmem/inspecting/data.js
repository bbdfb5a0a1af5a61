"use strict";

// The page's data: facts as JSON, arrays as base64 of deflated planes of bytes (pkmem/inspecting/packing.py).

const facts = JSON.parse(document.getElementById("facts").textContent);
const kinds = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, bfloat16: Uint16Array };
const loading = new Map();

/** An array of the page by name, decoded the first time that it is asked for. */
function load(name) {
  if (!loading.has(name)) loading.set(name, decode(name));
  return loading.get(name);
}

/** Several arrays of a memory, by their names in it. */
async function loadOf(memory, names) {
  const arrays = await Promise.all(names.map((name) => load(`${facts.memories[memory].name}.${name}`)));
  return Object.fromEntries(names.map((name, i) => [name, arrays[i]]));
}

async function decode(name) {
  const [dtype] = facts.blocks[name];
  const letters = atob(document.getElementById(name).textContent);
  const deflated = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) deflated[i] = letters.charCodeAt(i);
  const stream = new Blob([deflated]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  if (dtype === "json") return JSON.parse(new TextDecoder().decode(bytes));
  const size = kinds[dtype].BYTES_PER_ELEMENT;
  const length = bytes.length / size;
  const numbers = new kinds[dtype](length);
  for (let plane = 0; plane < size; plane++) {
    const shift = 8 * plane;
    for (let i = 0, at = plane * length; i < length; i++, at++) numbers[i] |= bytes[at] << shift;
  }
  if (dtype !== "bfloat16") return numbers;
  return new Float32Array(Uint32Array.from(numbers, (half) => half << 16).buffer);
}

/** The last place in an ascending array whose number is at most `number`, -1 if there is none. */
function lastUpTo(ascending, number) {
  let low = 0;
  let high = ascending.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ascending[middle] <= number) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** The place of a number in an ascending array, -1 if it is not there. */
function placeIn(ascending, number) {
  const place = lastUpTo(ascending, number);
  return ascending[place] === number ? place : -1;
}

/** The heads whose bits a number has. */
function headsOf(bits) {
  const heads = [];
  for (let head = 0; head < 32; head++) if ((bits >>> head) & 1) heads.push(head);
  return heads;
}

const counted = new Intl.NumberFormat("en");
const percent = (share) => (share === null ? "none" : `${(100 * share).toFixed(1)} %`);

/** A text with what cannot be seen, or turns the direction of writing, made visible. */
function visible(text, keepLines) {
  return text.replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]|\p{Cs}/gu, (letter) => {
    if (letter === "\n") return keepLines ? "\u21b5\n" : "\u21b5";
    if (letter === "\t") return "\u21e5";
    return `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`;
  });
}

/** An element with attributes and children; texts stand in it as texts. */
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, content] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), content);
    else element.setAttribute(name, content);
  }
  element.append(...children);
  return element;
}

const at = (id) => document.getElementById(id);
