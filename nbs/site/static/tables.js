// Sorts a table of the class `atlas` by the column that is clicked, and filters its rows by the words typed above it.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.atlas")) {
    const body = table.tBodies[0];
    const filter = document.createElement("input");
    filter.className = "atlas";
    filter.placeholder = "Filter: resnet, fp16, graph ...";
    filter.setAttribute("aria-label", "Filter the rows");
    table.parentNode.insertBefore(filter, table);
    filter.addEventListener("input", () => {
      const words = filter.value.toLowerCase().split(/\s+/);
      for (const row of body.rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.title = "Sort";
      head.addEventListener("click", () => {
        const descending = head.dataset.order !== "descending";
        for (const other of table.tHead.rows[0].cells) delete other.dataset.order;
        head.dataset.order = descending ? "descending" : "ascending";
        const value = (row) => row.cells[column].textContent.trim();
        const number = (text) => (text === "" ? NaN : Number(text.replaceAll(",", "")));
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === "" || y === "") return (x === "") - (y === ""); // blanks last, either way
          const [m, n] = [number(x), number(y)];
          const order = Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n;
          return descending ? -order : order;
        });
        body.append(...rows);
      });
    });
  }
});
