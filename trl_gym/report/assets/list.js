// Long lists: only the rows that are seen are in the document.

const OVERSCAN = 8;
const HEAD_HEIGHT = 36;

/** A column of words, and one of numbers. `value(item)` is what it is sorted by, `cell(item)` what is shown. */
function words(key, label, size, value, cell = value, title = null) {
  return { key, label, size, value, cell, title, num: false };
}

function numbers(key, label, size, value, cell = (item) => num(value(item)), title = null) {
  return { key, label, size, value, cell, title, num: true };
}

/**
 * A table of thousands of rows.
 *
 * columns: from `words` and `numbers`; `size` is a CSS grid track.
 * options: {label, href(item), card(item) for narrow screens, sort: {key, down}, onSort(sort), rowHeight, cardHeight}
 */
class DataTable {
  constructor(columns, options) {
    this.columns = columns;
    this.options = options;
    this.items = [];
    this.at = -1;
    this.sort = options.sort || null;
    this.isCards = isNarrow() && Boolean(options.card);
    this.height = this.isCards ? options.cardHeight : options.rowHeight || 36;
    this.build();
  }

  build() {
    this.body = el("div", { class: "rows", role: "rowgroup" });
    this.head = this.isCards ? this.sortChoice() : el("div", { class: "head row", role: "row" });
    const css = { "--columns": this.columns.map((column) => column.size).join(" "), "--row": `${this.height}px` };
    this.table = el(
      "div",
      { class: this.isCards ? "table cards" : "table", role: "table", "aria-label": this.options.label, css },
      this.isCards ? null : this.head,
      this.body,
    );
    this.scroller = el("div", { class: "scroller", tabindex: "-1" }, this.table);
    this.scroller.addEventListener(
      "scroll",
      perFrame(() => this.draw()),
      { passive: true },
    );
    this.node = el("div", { class: "list" }, this.isCards ? this.head : null, this.scroller);
    onWidth(this.scroller, () => this.draw());
  }

  get selected() {
    return this.items[this.at];
  }

  show(items, keepScroll = false) {
    this.items = sorted(items, this.columns, this.sort);
    this.at = -1;
    this.table.setAttribute("aria-rowcount", this.items.length + 1);
    this.body.style.height = `${this.items.length * this.height}px`;
    if (!keepScroll) this.scroller.scrollTop = 0;
    this.drawHead();
    this.draw();
  }

  mark(isIt) {
    this.at = this.items.findIndex(isIt);
    this.draw();
  }

  move(by) {
    if (!this.items.length) return;
    this.at = Math.max(0, Math.min(this.at + by, this.items.length - 1));
    const { scroller, height } = this;
    const top = this.at * height;
    const below = top + height + (this.isCards ? 0 : HEAD_HEIGHT) - scroller.clientHeight;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    else if (below > scroller.scrollTop) scroller.scrollTop = below;
    this.draw();
  }

  draw() {
    const { scrollTop, clientHeight } = this.scroller;
    const first = Math.max(0, Math.floor(scrollTop / this.height) - OVERSCAN);
    const last = Math.min(this.items.length, Math.ceil((scrollTop + clientHeight) / this.height) + OVERSCAN);
    const rows = [];
    for (let at = first; at < last; at++) rows.push(this.row(at));
    this.body.replaceChildren(...rows);
  }

  row(at) {
    const { href, card } = this.options;
    const item = this.items[at];
    const attrs = { class: at === this.at ? "row selected" : "row", role: "row", "aria-rowindex": at + 2 };
    const cell = (column) => el("div", { class: column.num ? "cell num" : "cell", role: "cell" }, column.cell(item));
    return el(
      href ? "a" : "div",
      { ...attrs, href: href ? href(item) : null, css: { "--at": `${at * this.height}px` } },
      this.isCards ? card(item) : this.columns.map(cell),
    );
  }

  sortBy(key, down) {
    this.sort = key ? { key, down } : null;
    this.drawHead();
    this.options.onSort(this.sort);
  }

  drawHead() {
    if (!this.isCards) this.head.replaceChildren(...this.columns.map((column) => this.headCell(column)));
  }

  headCell(column) {
    const isSorted = this.sort && this.sort.key === column.key;
    const mark = isSorted ? (this.sort.down ? " ↓" : " ↑") : "";
    const turn = () => this.sortBy(column.key, isSorted ? !this.sort.down : column.num);
    const button = { type: "button", class: "sort", onclick: turn, title: column.title };
    const order = isSorted ? (this.sort.down ? "descending" : "ascending") : null;
    return el(
      "div",
      { class: column.num ? "cell num" : "cell", role: "columnheader", "aria-sort": order },
      column.value
        ? el("button", button, column.label, el("span", { class: "mark" }, mark))
        : el("span", { title: column.title }, column.label),
    );
  }

  sortChoice() {
    const select = el("select", {}, el("option", { value: "" }, "in order of steps"));
    for (const column of this.columns.filter((own) => own.value)) {
      for (const down of [true, false]) {
        const selected = this.sort && this.sort.key === column.key && this.sort.down === down;
        const text = `${column.title || column.label}, ${down ? "high to low" : "low to high"}`;
        select.append(el("option", { value: `${column.key} ${down}`, selected }, text));
      }
    }
    select.addEventListener("change", () => {
      const [key, down] = select.value.split(" ");
      this.sortBy(key, down === "true");
    });
    return el("label", { class: "field sorting" }, el("span", {}, "sort"), select);
  }
}

function sorted(items, columns, sort) {
  const column = sort && columns.find((own) => own.key === sort.key);
  if (!column || !column.value) return items;
  const sign = sort.down ? -1 : 1;
  const keyed = items.map((item, at) => [column.value(item), at, item]);
  keyed.sort(([a, i], [b, j]) => {
    const [noA, noB] = [a === null || a === undefined, b === null || b === undefined];
    if (noA || noB) return noA - noB || i - j; // what is not known comes last
    return sign * (a < b ? -1 : a > b ? 1 : 0) || i - j;
  });
  return keyed.map(([, , item]) => item);
}

const sortQuery = (sort) => (sort ? { sort: `${sort.key}${sort.down ? "-" : ""}` } : {});

function readSort(params) {
  const text = params.get("sort");
  return text ? { key: text.replace(/-$/, ""), down: text.endsWith("-") } : null;
}
