"""The page that ``show --html`` writes: one file, which needs nothing else."""

from __future__ import annotations

import html
import json

from ...qcow2.inspect import KINDS, HostMap

__all__ = ["page"]

_PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@NAME@</title>
<style>
body { margin: 1.5em; background: #16181d; color: #d8dae0; font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.2em; margin: 0 } p { margin: .3em 0 1em; color: #9a9eab }
#kinds { display: flex; flex-wrap: wrap; gap: .3em .6em; margin-bottom: 1em }
#kinds button { background: #23262e; color: inherit; border: 1px solid #3b3f4a; font: inherit;
  border-radius: 4px; padding: .1em .6em; cursor: pointer }
#kinds button.off { opacity: .35 } #kinds i { display: inline-block; width: .8em; height: .8em;
  margin-right: .4em; border-radius: 2px }
canvas { background: #0e0f13; border: 1px solid #3b3f4a; cursor: crosshair; width: 100% }
#told { min-height: 3em; white-space: pre-wrap; font-family: ui-monospace, monospace }
.bad { color: #ff7b7b }
</style></head><body>
<h1>@NAME@</h1><p id="facts"></p><div id="kinds"></div>
<canvas id="map"></canvas><div id="told">Wheel: zoom. Drag: move. A kind: show or hide it.</div>
<div class="bad" id="problems"></div>
<script>
"use strict";
const map = @DATA@;
const canvas = document.getElementById("map"), told = document.getElementById("told");
const shown = new Set(map.kinds.map((_, index) => index));
let size = 8, top_ = 0, drag = null;
const text = bytes => {
  let unit = 0;
  while (bytes >= 1024 && unit < 6) { bytes /= 1024; unit++; }
  return +bytes.toPrecision(3) + " " + ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][unit] + "B";
};
const columns = () => Math.max(1, Math.floor(canvas.width / size));
function draw() {
  canvas.width = canvas.clientWidth;
  canvas.height = Math.max(240, window.innerHeight - canvas.offsetTop - 120);
  const pen = canvas.getContext("2d"), wide = columns();
  const rows = Math.ceil(map.cells.length / wide);
  top_ = Math.max(0, Math.min(top_, rows - 1));
  for (let row = top_; row < rows && (row - top_) * size < canvas.height; row++)
    for (let column = 0; column < wide; column++) {
      const index = row * wide + column;
      if (index >= map.cells.length) break;
      let best = -1, most = 0, sum = 0;
      for (const [kind, count] of map.cells[index]) {
        sum += count;
        if (shown.has(kind) && (count > most || map.kinds[kind] === "leaked")) {
          best = kind; most = map.kinds[kind] === "leaked" ? Infinity : count;
        }
      }
      if (best < 0) { if (!shown.has(0) || sum) continue; best = 0; }
      pen.globalAlpha = best ? .35 + .65 * Math.min(1, sum / map.perCell) : 1;
      pen.fillStyle = map.colours[best];
      const gap = size > 3 ? 1 : 0;
      pen.fillRect(column * size, (row - top_) * size, size - gap, size - gap);
    }
  pen.globalAlpha = 1;
}
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  const first = top_ * columns();
  size = Math.max(2, Math.min(48, size * (event.deltaY < 0 ? 1.25 : .8)));
  top_ = Math.floor(first / columns());
  draw();
}, { passive: false });
canvas.addEventListener("mousedown", event => { drag = [event.clientY, top_]; });
window.addEventListener("mouseup", () => { drag = null; });
canvas.addEventListener("mousemove", event => {
  if (drag) { top_ = drag[1] + Math.round((drag[0] - event.clientY) / size); draw(); return; }
  const box = canvas.getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left) / size);
  const index = (Math.floor((event.clientY - box.top) / size) + top_) * columns() + column;
  if (column >= columns() || index >= map.cells.length) return;
  const first = index * map.perCell, end = Math.min(first + map.perCell, map.clusters);
  const lines = map.cells[index].map(([kind, count]) => `${map.kinds[kind]}: ${count}`);
  told.textContent = `clusters ${first} to ${end - 1}, host offset 0x`
    + (BigInt(first) * BigInt(map.clusterSize)).toString(16) + "\\n" + (lines.join(", ") || "free");
});
window.addEventListener("resize", draw);
document.getElementById("facts").textContent = `${text(map.size)} disk, `
  + `${map.clusters} clusters of `
  + `${text(map.clusterSize)}; a cell is ${map.perCell} of them`;
document.getElementById("problems").textContent = map.problems.join("\\n");
for (const [kind, name] of map.kinds.entries()) {
  if (!(name in map.totals)) continue;
  const button = document.createElement("button"), colour = document.createElement("i");
  colour.style.background = map.colours[kind];
  const count = map.totals[name];
  button.append(colour, `${name} ${count} (${text(count * map.clusterSize)})`);
  button.addEventListener("click", () => {
    shown.has(kind) ? shown.delete(kind) : shown.add(kind);
    button.classList.toggle("off", !shown.has(kind));
    draw();
  });
  document.getElementById("kinds").append(button);
}
draw();
</script></body></html>
"""


def page(name: str, size: int, found: HostMap, colours: dict[str, str]) -> str:
    """The page for an image of ``size`` guest bytes."""
    numbers = {kind: index for index, kind in enumerate(KINDS)}
    data = {
        "size": size,
        "clusterSize": found.cluster_size,
        "clusters": found.clusters,
        "perCell": found.per_cell,
        "kinds": KINDS,
        "colours": [colours[kind] for kind in KINDS],
        "totals": found.totals(),
        "cells": [[(numbers[kind], n) for kind, n in cell.items()] for cell in found.cells],
        "problems": found.problems,
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return _PAGE.replace("@NAME@", html.escape(name)).replace("@DATA@", text)
