"use strict";
const rows = [...document.querySelectorAll(".row")];
const against = document.getElementById("against");
const search = document.getElementById("search");
const count = document.getElementById("count");
const buttons = [...document.querySelectorAll("button[data-filter]")];
let filter = "all";

function matches(row) {
  const outcome = JSON.parse(row.dataset.outcomes)[against.value];
  const kinds = { all: true, wrong: row.dataset.wrong === "1", cut: row.dataset.cut === "1" };
  if (filter in kinds ? !kinds[filter] : outcome !== filter) return false;
  const query = search.value.trim().toLowerCase();
  return !query || row.textContent.toLowerCase().includes(query);
}

function show() {
  let shown = 0;
  for (const row of rows) {
    row.hidden = !matches(row);
    shown += !row.hidden;
    for (const answer of row.querySelectorAll("[data-variant]")) {
      answer.classList.toggle("opponent", answer.dataset.variant === against.value);
    }
  }
  count.textContent = `${shown} of ${rows.length} rows`;
  for (const button of buttons) {
    button.setAttribute("aria-pressed", String(button.dataset.filter === filter));
  }
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    filter = button.dataset.filter;
    show();
  });
}
against.addEventListener("change", show);
search.addEventListener("input", show);
document.getElementById("filters").hidden = false;
show();
