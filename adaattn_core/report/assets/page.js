"use strict";
// Hover and focus show a mark's text and mark the same thing everywhere; arrow keys walk.
(() => {
  const tip = document.getElementById("tip");
  const marks = [...document.querySelectorAll(".mark")];
  const same = key => key
    ? document.querySelectorAll(`[data-key="${CSS.escape(key)}"]`) : [];
  let shown = null;

  function hide() {
    if (shown) for (const other of same(shown.dataset.key)) other.classList.remove("on");
    shown = null;
    tip.hidden = true;
  }

  function show(mark) {
    hide();
    shown = mark;
    for (const other of same(mark.dataset.key)) other.classList.add("on");
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const box = mark.getBoundingClientRect();
    const left = Math.min(box.right + 8, document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(left, 4) + window.scrollX}px`;
    tip.style.top = `${box.bottom + 6 + window.scrollY}px`;
  }

  // One mark of every figure can be reached by Tab; arrows go on from there.
  for (const svg of document.querySelectorAll("svg")) {
    const first = svg.querySelector(".mark");
    if (first) first.setAttribute("tabindex", "0");
  }

  function neighbour(mark, key) {
    const all = [...mark.ownerSVGElement.querySelectorAll(".mark")];
    const at = all.indexOf(mark);
    if (key === "Home") return all[0];
    if (key === "End") return all[all.length - 1];
    const row = Number(mark.dataset.row), column = Number(mark.dataset.column);
    if (row && (key === "ArrowUp" || key === "ArrowDown")) {
      const next = row + (key === "ArrowUp" ? -1 : 1);
      return all.find(m => Number(m.dataset.row) === next && Number(m.dataset.column) === column);
    }
    if (key === "ArrowRight" || key === "ArrowDown") return all[at + 1];
    if (key === "ArrowLeft" || key === "ArrowUp") return all[at - 1];
    return undefined;
  }

  for (const mark of marks) {
    mark.addEventListener("mouseenter", () => show(mark));
    mark.addEventListener("mouseleave", hide);
    mark.addEventListener("focus", () => show(mark));
    mark.addEventListener("blur", hide);
    mark.addEventListener("keydown", event => {
      if (event.key === "Escape") return hide();
      const next = neighbour(mark, event.key);
      if (!next) return undefined;
      event.preventDefault();
      mark.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      return next.focus();
    });
  }

  // Faces of a grid: what its cells are coloured by.
  for (const set of document.querySelectorAll(".faces")) {
    set.hidden = false;
    set.addEventListener("change", event => {
      const face = event.target.value;
      for (const cell of set.closest("figure").querySelectorAll(".cell")) {
        cell.setAttribute("fill", cell.getAttribute(`data-fill${face}`));
        const words = cell.nextElementSibling;
        words.textContent = cell.getAttribute(`data-text${face}`);
        words.style.fill = cell.getAttribute(`data-ink${face}`);
      }
    });
  }

  // Tables: a click on a heading sorts, words filter.
  const value = cell => cell.dataset.value ?? cell.textContent;
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = head.querySelector("button");
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [value(a.cells[column]), value(b.cells[column])];
          const [p, q] = [parseFloat(x), parseFloat(y)];
          const order = Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q;
          return up ? order : -order;
        });
        body.append(...rows);
      });
    });
    const filter = document.querySelector(`input[data-table="${table.id}"]`);
    if (!filter) continue;
    filter.parentElement.hidden = false;
    filter.addEventListener("input", () => {
      const words = filter.value.toLowerCase();
      for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(words);
    });
  }
})();
