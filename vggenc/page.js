"use strict";

// Tables: a click on a header sorts by its column, another one turns the order round; empty cells stay last.
const collator = new Intl.Collator("en", { numeric: true });
for (const button of document.querySelectorAll("th > button")) {
  button.addEventListener("click", () => {
    const header = button.parentNode;
    const body = header.closest("table").tBodies[0];
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of header.parentNode.children) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const compare = header.classList.contains("number") ? (a, b) => a - b : collator.compare;
    const keyed = Array.from(body.rows, (row) => {
      const cell = row.cells[header.cellIndex];
      return [cell.dataset.key ?? cell.textContent, row];
    });
    keyed.sort(([a], [b]) => (a === "") - (b === "") || (descending ? compare(b, a) : compare(a, b)));
    for (const [, row] of keyed) body.append(row);
  });
}

// Maps: a click on a group's name in the legend leaves the others faint, another one brings them back.
for (const button of document.querySelectorAll(".legend > button")) {
  button.addEventListener("click", () => {
    const chosen = button.getAttribute("aria-pressed") !== "true";
    for (const other of button.parentNode.children) other.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-pressed", String(chosen));
    for (const group of button.closest(".map").querySelectorAll("g[data-group]")) {
      group.classList.toggle("faint", chosen && group.dataset.group !== button.dataset.group);
    }
  });
}
