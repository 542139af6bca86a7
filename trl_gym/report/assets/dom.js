"use strict";
// Elements. Text of the journal only ever becomes a text node or the value of an attribute that does not run.

const SVG_NS = "http://www.w3.org/2000/svg";

/** An element. `attrs`: `on<event>` listeners, `css` custom properties, else attributes; null is left out. */
function el(tag, attrs, ...children) {
  return fill(document.createElement(tag), attrs, children);
}

function svg(tag, attrs, ...children) {
  return fill(document.createElementNS(SVG_NS, tag), attrs, children);
}

function fill(node, attrs, children) {
  for (const [name, value] of Object.entries(attrs || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "css") for (const [key, own] of Object.entries(value)) node.style.setProperty(key, own);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "href" && !String(value).startsWith("#")) throw new Error("links stay in the page");
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  append(node, children);
  return node;
}

function append(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

function byId(id) {
  return document.getElementById(id);
}

/** Runs `work` once per frame, however often it is called. */
function perFrame(work) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      work();
    });
  };
}

/** Draws again when the width of a node changes; ends when the node leaves the page. */
function onWidth(node, draw) {
  let last = -1;
  const observer = new ResizeObserver(() => {
    if (!node.isConnected) return observer.disconnect();
    const width = Math.floor(node.clientWidth);
    if (width > 0 && width !== last) {
      last = width;
      draw(width);
    }
  });
  observer.observe(node);
}

const isNarrow = () => window.matchMedia("(max-width: 720px)").matches;

// -- the one tooltip of the page --

const tip = {
  node: null,
  show(x, y, content) {
    if (!tip.node) document.body.append((tip.node = el("div", { id: "tip", role: "tooltip" })));
    tip.node.replaceChildren();
    append(tip.node, [content]);
    tip.node.hidden = false;
    const box = tip.node.getBoundingClientRect();
    const left = Math.min(Math.max(8, x + 14), innerWidth - box.width - 8);
    const top = y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18;
    tip.node.style.left = `${Math.max(8, left)}px`;
    tip.node.style.top = `${Math.max(8, top)}px`;
  },
  hide() {
    if (tip.node) tip.node.hidden = true;
  },
};
