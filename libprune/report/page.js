"use strict";

// Tables: the head of a column sorts the rows by it, first up, then down, then back to the first order.
const NUMBER = /^[×\s]*([-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)/;

function numberIn(text) {
  const found = NUMBER.exec(text);
  return found ? Number(found[1].replace(/,/g, "").replace("−", "-")) : NaN;
}

function order(rows, column, sign) {
  const texts = new Map(rows.map((row) => [row, row.cells[column].textContent.trim()]));
  const numbers = [...texts.values()].every((text) => !text || !Number.isNaN(numberIn(text)));
  return [...rows].sort((one, other) => {
    const [a, b] = [texts.get(one), texts.get(other)];
    if (!a || !b) return (a ? 0 : 1) - (b ? 0 : 1);
    return sign * (numbers ? numberIn(a) - numberIn(b) : a.localeCompare(b, "en", { numeric: true }));
  });
}

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const first = body ? [...body.rows] : [];
  if (first.length < 2) continue;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.title = "sort by this column";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: "none" }[head.ariaSort] ?? "ascending";
      heads.forEach((one) => { one.ariaSort = "none"; });
      head.ariaSort = next;
      body.append(...(next === "none" ? first : order(first, column, next === "ascending" ? 1 : -1)));
    });
  });
}

// Pictures: the value under the pointer or the finger, at once. Without this script a browser shows it as a title.
const values = new Map();
for (const title of document.querySelectorAll(".spots title")) {
  values.set(title.parentNode, title.textContent);
  title.remove();
}
const box = document.createElement("div");
box.className = "value";
box.hidden = true;
document.body.append(box);

document.addEventListener("pointerover", (event) => {
  box.hidden = !values.has(event.target);
  if (box.hidden) return;
  box.textContent = values.get(event.target);
  const spot = event.target.getBoundingClientRect();
  const left = Math.min(spot.right + 6, document.documentElement.clientWidth - box.offsetWidth - 6);
  box.style.left = `${Math.max(6, left)}px`;
  box.style.top = `${Math.max(6, spot.top - box.offsetHeight - 6)}px`;
});
document.addEventListener("scroll", () => { box.hidden = true; }, true);
