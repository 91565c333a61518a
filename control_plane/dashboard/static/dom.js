// Elements from data. Every text is a text node: names and messages come from workloads, and are never markup.

const SVG = "http://www.w3.org/2000/svg";

/** The text with control and formatting characters escaped, so that nothing can reorder or hide what is read. */
export function printable(text) {
  return String(text).replace(/\p{C}/gu, (character) => `\\u{${character.codePointAt(0).toString(16)}}`);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false && child !== "") {
      element.append(child instanceof Node ? child : printable(child));
    }
  }
  return element;
}

/** An HTML element. Attributes that are null or false are left out; children are texts, nodes, or lists of them. */
export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function s(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** A part of a page with a heading; `key` tells it from others when the page is drawn anew. */
export function section(key, title, ...children) {
  const id = `h-${key}`;
  return h("section", { "data-key": key, "aria-labelledby": id }, h("h2", { id }, title), children);
}

/**
 * A table, each row of which is a card where there is little room.
 * columns: names, those that begin with ">" aligned to the right. rows: lists of cells, or {key, cells}.
 */
export function table(label, columns, rows) {
  const shown = columns.map((name) => ({ name: name.replace(/^>/, ""), right: name.startsWith(">") ? "right" : null }));
  const head = shown.map(({ name, right }) => h("th", { scope: "col", role: "columnheader", class: right }, name));
  const body = rows.map((row) => {
    const cells = row.cells ?? row;
    return h("tr", { role: "row", "data-key": row.key ?? null, class: row.style ?? null }, cells.map((cell, index) =>
      h("td", { role: "cell", class: classes(shown[index].right, cell), "data-label": shown[index].name }, h("span", {}, cell))));
  });
  return h("div", { class: "scroll" }, h("table", { role: "table", "aria-label": label },
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, head)), h("tbody", { role: "rowgroup" }, body)));
}

/** Cells that say nothing are left out of cards. */
const classes = (right, cell) => [right, [cell].flat(Infinity).every((part) => part === "" || part === "-") ? "empty" : ""].filter(Boolean).join(" ") || null;

/** A word with a colour; the word says it too. */
export function badge(text, style) {
  return h("span", { class: `badge ${style}` }, text);
}

/** A link to a page of the dashboard. */
export function link(text, ...path) {
  return h("a", { href: `#/${path.map(encodeURIComponent).join("/")}` }, text);
}

/** Lines of text as they are, each with the style that `styleOf` gives it. */
export function lines(label, texts, styleOf = () => null) {
  return h("pre", { "aria-label": label, tabindex: 0 }, texts.map((text) => h("span", { class: styleOf(text) }, text || " ")));
}

const key = (node) => (node.nodeType === Node.ELEMENT_NODE ? node.getAttribute("data-key") : null);

/** Changes what is there into what should be, keeping elements: focus, selection, scrolling and open details stay. */
export function morph(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !(name === "open" && old.nodeName === "DETAILS")) old.removeAttribute(name);
  }
  if (old.nodeName !== "TEXTAREA") morphChildren(old, fresh);
}

export function morphChildren(old, fresh) {
  const keyed = new Map([...old.childNodes].filter(key).map((child) => [key(child), child]));
  let cursor = old.firstChild;
  for (const next of [...fresh.childNodes]) {
    const wanted = key(next);
    const found = wanted ? keyed.get(wanted) : cursor && !key(cursor) ? cursor : null;
    if (found && found.nodeType === next.nodeType && found.nodeName === next.nodeName) {
      if (found === cursor) cursor = cursor.nextSibling;
      else old.insertBefore(found, cursor);
      morph(found, next);
    } else {
      old.insertBefore(next, cursor);
    }
  }
  while (cursor) {
    const gone = cursor;
    cursor = cursor.nextSibling;
    gone.remove();
  }
}
