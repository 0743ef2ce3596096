"""The page that ``show --html`` writes: one file, which needs nothing else.

It has the whole map, as runs of clusters of one kind, so that it can be looked at from afar and
cluster by cluster. Its size is bounded: a map of too many runs is told in larger units.
"""

from __future__ import annotations

import html
import json

from ...qcow2.host_map import HostMap

__all__ = ["page"]

_MOST_RUNS = 100_000
"""About 600 KiB."""

_PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@NAME@</title>
<style>
* { box-sizing: border-box }
body { margin: 0; padding: 1em 1.5em; height: 100vh; display: flex; flex-direction: column;
  background: #16181d; color: #d8dae0; font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.2em; margin: 0; overflow-wrap: anywhere }
#facts { margin: .1em 0 .8em; color: #9a9eab }
#kinds { display: flex; flex-wrap: wrap; gap: .3em .5em; margin-bottom: .8em; max-height: 9em;
  overflow: auto; flex: none }
button { background: #23262e; color: inherit; border: 1px solid #3b3f4a; font: inherit;
  border-radius: 4px; padding: 0 .6em; cursor: pointer }
button:hover, button:focus-visible { border-color: #8a8fa0; outline: none }
button.off { opacity: .4; text-decoration: line-through }
button small { color: #9a9eab }
i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px }
#bar { width: 100%; height: 14px; border: 1px solid #3b3f4a; cursor: pointer; flex: none;
  background: #0e0f13; margin-bottom: 4px }
#map { width: 100%; flex: 1; min-height: 100px; background: #0e0f13; border: 1px solid #3b3f4a;
  cursor: crosshair; touch-action: none }
#map:focus-visible { outline: 1px solid #8a8fa0 }
#scale { display: flex; align-items: center; gap: .5em; margin-top: .5em; color: #9a9eab }
#told { height: 4.6em; overflow: auto; white-space: pre-wrap; flex: none;
  font: 13px/1.5 ui-monospace, monospace }
.bad { color: #ff7b7b; white-space: pre-wrap; max-height: 6em; overflow: auto; flex: none }
</style></head><body>
<h1>@NAME@</h1><div id="facts"></div><div id="kinds"></div>
<canvas id="bar"></canvas><canvas id="map" tabindex="0"></canvas>
<div id="scale"><button id="out" title="key -">&minus;</button>
<button id="in" title="key +">+</button><span id="zoom"></span></div>
<div id="told">Wheel: zoom. Drag, arrows or the bar: move. A kind: show or hide it,
with Shift that alone.</div><div class="bad" id="problems"></div>
<script>
"use strict";
const image = @DATA@;
const byId = id => document.getElementById(id);
const canvas = byId("map"), bar = byId("bar"), unit = image.unit, total = image.clusters;
const shown = new Set(image.kinds.map((_, kind) => kind));
const LEAKED = 1, CELL = 8, LARGEST = 48;

// The runs: where each begins, in clusters, and of which kind it is.
const tokens = image.runs ? image.runs.split(" ") : [];
const begins = new Float64Array(tokens.length + 1), kinds = new Uint8Array(tokens.length);
tokens.forEach((token, index) => {
  const [kind, length] = token.split(":");
  kinds[index] = kind;
  begins[index + 1] = Math.min(total, begins[index] + parseInt(length, 36) * unit);
});
function runAt(cluster) {
  let low = 0, high = kinds.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (begins[middle] <= cluster) low = middle; else high = middle - 1;
  }
  return low;
}

const view = { per: unit, cell: CELL, top: 0 };  // clusters in a cell, its pixels, first cell
const columns = () => Math.max(1, Math.floor(canvas.clientWidth / view.cell));
const rows = () => Math.max(1, Math.ceil(canvas.clientHeight / view.cell));
const cells = () => Math.ceil(total / view.per);
const bytes = count => {
  let power = 0;
  while (count >= 1024 && power < 6) { count /= 1024; power++; }
  return +count.toPrecision(3) + " " + ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][power] + "B";
};
const at = cluster => "0x" + (BigInt(cluster) * BigInt(image.clusterSize)).toString(16);
const number = count => count.toLocaleString("en");

// Clusters of each kind in a range; calls back for each run in it.
function eachRun(first, end, call) {
  for (let run = runAt(first); run < kinds.length && begins[run] < end; run++)
    call(kinds[run], Math.min(end, begins[run + 1]) - Math.max(first, begins[run]), run);
}
function summary(first, end) {
  const counts = new Map();
  eachRun(first, end, (kind, count) => counts.set(kind, (counts.get(kind) || 0) + count));
  return counts;
}
// What a cell is drawn as: what most of it is, and what is rare in it.
function telling(counts) {
  let best = -1, rare = -1;
  for (const [kind, count] of counts) {
    if (!shown.has(kind)) continue;
    if (best < 0 || !best || (kind && count > counts.get(best))) best = kind;
  }
  if (shown.has(LEAKED) && counts.has(LEAKED)) best = LEAKED;
  for (const [kind, count] of counts)
    if (kind && kind !== best && shown.has(kind) && (rare < 0 || count < counts.get(rare)))
      rare = kind;
  return [best, rare];
}
function prepare(target) {
  const scale = window.devicePixelRatio || 1;
  target.width = Math.round(target.clientWidth * scale);
  target.height = Math.round(target.clientHeight * scale);
  const pen = target.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  return pen;
}
function draw() {
  const wide = columns(), high = rows(), size = view.cell, gap = size > 3 ? 1 : 0;
  const last = Math.max(0, Math.ceil(cells() / wide) - Math.max(1, high - 1)) * wide;
  view.top = Math.max(0, Math.min(Math.floor(view.top / wide) * wide, last));
  const pen = prepare(canvas);
  const stop = Math.min(cells(), view.top + wide * high);
  for (let cell = view.top; cell < stop; cell++) {
    const first = cell * view.per, end = Math.min(total, first + view.per);
    const [best, rare] = telling(summary(first, end));
    const x = (cell - view.top) % wide * size, y = Math.floor((cell - view.top) / wide) * size;
    pen.fillStyle = best < 0 ? "#1b1d23" : image.colours[best];
    pen.fillRect(x, y, size - gap, size - gap);
    if (rare >= 0 && size >= 6) {
      pen.fillStyle = image.colours[rare];
      pen.fillRect(x, y, Math.ceil(size / 2), Math.ceil(size / 2));
    }
  }
  drawBar(view.top * view.per, Math.min(total, stop * view.per));
  byId("zoom").textContent = (view.per === 1 ? "a cell is one cluster"
    : `a cell is ${number(view.per)} clusters (${bytes(view.per * image.clusterSize)})`)
    + (unit > 1 && view.per === unit ? "; there is no finer detail in this page" : "");
}
function drawBar(first, end) {
  const pen = prepare(bar), wide = bar.clientWidth, high = bar.clientHeight;
  for (let x = 0; x < wide; x++) {
    const start = Math.floor(x * total / wide), stop = Math.ceil((x + 1) * total / wide);
    const [best] = telling(summary(start, Math.max(stop, start + 1)));
    if (best < 0) continue;
    pen.fillStyle = image.colours[best];
    pen.fillRect(x, 0, 1, high);
  }
  pen.fillStyle = "#ffffff40";
  const left = first / total * wide, width = Math.max(3, (end - first) / total * wide);
  pen.fillRect(left, 0, width, high);
  pen.strokeStyle = "#ffffff";
  pen.strokeRect(left + .5, .5, width - 1, high - 1);
}

function cellUnder(event) {
  const box = canvas.getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left) / view.cell);
  const row = Math.floor((event.clientY - box.top) / view.cell);
  return column < 0 || column >= columns() ? -1 : view.top + row * columns() + column;
}
// Nearer (1) or farther (-1), with the cluster under the pointer in its row.
function zoom(direction, event) {
  const wide = columns();
  const cell = event ? Math.max(0, cellUnder(event)) : view.top;
  const row = Math.floor((cell - view.top) / wide) * view.cell;
  const cluster = Math.min(cell * view.per, Math.max(0, total - 1));
  if (direction > 0) {
    if (view.per > unit) view.per = Math.max(unit, view.per / 2);
    else view.cell = Math.min(LARGEST, view.cell + Math.max(2, view.cell >> 1));
  } else if (view.cell > CELL) view.cell = Math.max(CELL, Math.floor(view.cell / 1.5));
  else if (cells() > columns()) view.per *= 2;
  const to = Math.floor(cluster / view.per);
  view.top = (Math.floor(to / columns()) - Math.floor(row / view.cell)) * columns();
  draw();
}
function goTo(cluster) {
  view.top = (Math.floor(Math.floor(cluster / view.per) / columns()) - (rows() >> 1)) * columns();
  draw();
}
function tell(cell) {
  if (cell < 0 || cell >= cells()) return;
  const first = cell * view.per, end = Math.min(total, first + view.per);
  const counts = [...summary(first, end)].sort((a, b) => b[1] - a[1]);
  const run = runAt(first), name = image.kinds[kinds[run]];
  const lines = [end - first === 1 ? `cluster ${number(first)} at ${at(first)}`
    : `clusters ${number(first)} to ${number(end - 1)} at ${at(first)}`];
  lines.push(counts.map(([kind, count]) => end - first === 1 ? image.kinds[kind]
    : `${image.kinds[kind]}: ${number(count)}`).join(", "));
  lines.push(`${end - first === 1 ? "It" : "The first"} is one of ${number(begins[run + 1]
    - begins[run])} in a row (${name}), from ${at(begins[run])} to ${at(begins[run + 1])}`);
  byId("told").textContent = lines.join("\\n");
}

let drag = null;
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  zoom(event.deltaY < 0 ? 1 : -1, event);
}, { passive: false });
canvas.addEventListener("pointerdown", event => { drag = [event.clientY, view.top]; });
window.addEventListener("pointerup", () => { drag = null; });
canvas.addEventListener("pointermove", event => {
  if (!drag) return tell(cellUnder(event));
  view.top = drag[1] + Math.round((drag[0] - event.clientY) / view.cell) * columns();
  draw();
});
bar.addEventListener("pointerdown", event => {
  goTo((event.clientX - bar.getBoundingClientRect().left) / bar.clientWidth * total);
});
canvas.addEventListener("keydown", event => {
  const page = Math.max(1, rows() - 2) * columns();
  const moves = { ArrowUp: -columns(), ArrowDown: columns(), PageUp: -page, PageDown: page,
    Home: -Infinity, End: cells() };
  if (event.key in moves) { view.top = Math.max(0, view.top + moves[event.key]); draw(); }
  else if (event.key === "+" || event.key === "=") zoom(1);
  else if (event.key === "-") zoom(-1);
  else return;
  event.preventDefault();
});
byId("in").addEventListener("click", () => zoom(1));
byId("out").addEventListener("click", () => zoom(-1));
window.addEventListener("resize", draw);

byId("facts").textContent = `${bytes(image.size)} disk in a file of ${number(total)} clusters of `
  + `${bytes(image.clusterSize)}`;
byId("problems").textContent = image.problems.join("\\n");
for (const [kind, count] of image.totals) {
  const button = document.createElement("button"), colour = document.createElement("i");
  colour.style.background = image.colours[kind];
  const much = document.createElement("small");
  much.textContent = ` ${number(count)} (${bytes(count * image.clusterSize)})`;
  button.append(colour, image.kinds[kind], much);
  button.dataset.kind = kind;
  button.addEventListener("click", event => {
    if (event.shiftKey) {
      const alone = shown.size === 1 && shown.has(kind);
      shown.clear();
      image.kinds.forEach((_, other) => { if (alone || other === kind) shown.add(other); });
    } else if (!shown.delete(kind)) shown.add(kind);
    for (const other of byId("kinds").children)
      other.classList.toggle("off", !shown.has(+other.dataset.kind));
    draw();
  });
  byId("kinds").append(button);
}
while (Math.ceil(cells() / columns()) > rows() - 1) view.per *= 2;  // all of it, at first
draw();
</script></body></html>
"""


def page(name: str, size: int, found: HostMap, colours: list[str]) -> str:
    """The page for an image of ``size`` guest bytes."""
    unit, runs = found.runs(_MOST_RUNS)
    totals = found.totals()
    data = {
        "size": size,
        "clusterSize": found.cluster_size,
        "clusters": found.clusters,
        "unit": unit,
        "kinds": [_printable(kind) for kind in found.kinds],
        "colours": colours,
        "totals": [(found.kinds.index(kind), count) for kind, count in totals.items()],
        "runs": " ".join(f"{kind}:{_base36(length)}" for kind, length in runs),
        "problems": [_printable(problem) for problem in found.problems],
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return _PAGE.replace("@NAME@", html.escape(_printable(name))).replace("@DATA@", text)


def _printable(text: str) -> str:
    """Names as they can be shown: those of files may be no UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits
