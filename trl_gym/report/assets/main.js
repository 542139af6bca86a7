// The address decides what is shown: #overview, #steps, #groups?…, #rollouts?…, #failures, #group=id, #rollout=id.

const VIEWS = [
  ["overview", "Overview"],
  ["steps", "Steps"],
  ["groups", "Groups"],
  ["rollouts", "Rollouts"],
  ["failures", "Failures"],
  ["compare", "Compare"],
];
const LISTS = ["groups", "rollouts", "steps"];
const current = { view: "", query: "", rollout: null, table: null, scroll: new Map(), hash: null };

// In a notebook's frame the document has no address of its own: "#x" would mean the notebook's. There the history
// keeps the address as its state.
const hasAddress = location.protocol !== "about:";

/** Go to an address of this page. */
function go(hash, replace = false) {
  if (hasAddress && !replace && location.hash !== hash) {
    location.hash = hash;
    return;
  } // `hashchange` shows it
  if (replace || current.hash === hash) remember(hash);
  else history.pushState({ hash }, "");
  show(hash);
}

function replaceHash(hash) {
  remember(hash);
  current.hash = hash;
  if (LISTS.includes(current.view)) context.from = hash;
}

function remember(hash) {
  if (hasAddress) history.replaceState(null, "", hash);
  else history.replaceState({ hash }, "");
}

function followLinks(event) {
  const link = event.target.closest("a[href]");
  if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go(link.getAttribute("href"));
}

function parse(hash) {
  const text = hash.replace(/^#/, "") || "overview";
  const [, name, id, query] = /^(\w+)(?:=([^&?]*))?(?:[&?](.*))?$/.exec(text) || [null, "overview", "", ""];
  return { name, id: id === undefined ? "" : decodeId(id), query: query || "" };
}

function decodeId(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  } // an address that was typed by hand
}

const views = () => VIEWS.filter(([name]) => name !== "compare" || run.others);

function show(hash) {
  if (current.view) current.scroll.set(current.hash, scrollPlace());
  const { name, id, query } = parse(hash);
  const params = new URLSearchParams(query);
  const made =
    name === "rollout"
      ? rolloutView(id, params)
      : name === "group"
        ? groupView(id)
        : name === "steps"
          ? stepsView(params)
          : name === "groups"
            ? groupsView(params)
            : name === "rollouts"
              ? rolloutsView(params)
              : name === "failures"
                ? failuresView()
                : name === "compare" && run.others
                  ? compareView()
                  : { node: overviewView(name) };
  tip.hide();
  const stays = current.view === name && name === "rollout" && current.rollout === run.byId.get(id);
  Object.assign(current, {
    view: name,
    query,
    hash,
    table: made.table || null,
    rollout: name === "rollout" ? run.byId.get(id) : name === "group" ? run.byId.get(id) : null,
  });
  if (LISTS.includes(name)) context.from = hash;
  if (current.rollout !== null && current.rollout !== undefined) context.last = current.rollout;
  const view = byId("view");
  const focused = document.activeElement && document.activeElement.id;
  view.replaceChildren(made.node);
  view.className = name;
  drawBar(name);
  if (made.mounted) made.mounted();
  const field = focused && focused.startsWith("f-") ? byId(focused) : null;
  (field || scroller()).focus({ preventScroll: true }); // so that the keys that scroll, scroll
  if (!stays) restoreScroll(hash);
  document.title = `${name === "rollout" || name === "group" ? id : name} · ${run.run}`;
}

const scroller = () => document.querySelector("#view .scroller") || byId("view");
const scrollPlace = () => scroller().scrollTop;

function restoreScroll(hash) {
  const place = current.scroll.get(hash) || 0;
  requestAnimationFrame(() => {
    scroller().scrollTop = place;
  });
}

function drawBar(name) {
  const active = name === "rollout" ? "rollouts" : name === "group" ? "groups" : name;
  const back = name === "rollout" || name === "group";
  const bar = byId("bar");
  bar.replaceChildren();
  append(bar, [
    el(
      "a",
      { class: "brand", href: "#overview", title: `written ${new Date(run.written * 1000).toLocaleString()}` },
      run.run,
    ),
    el(
      "nav",
      { "aria-label": "views" },
      views().map(([own, label]) =>
        el(
          "a",
          {
            href: back && own === active ? (context.from.startsWith(`#${own}`) ? context.from : `#${own}`) : `#${own}`,
            "aria-current": own === active ? "page" : null,
          },
          label,
        ),
      ),
    ),
    run.reload_s > 0 &&
      el(
        "span",
        { class: "badge live", title: `the run goes on: read again every ${seconds(run.reload_s)}` },
        `as of ${new Date(run.written * 1000).toLocaleTimeString()}`,
      ),
    el(
      "button",
      {
        type: "button",
        class: "plain help",
        title: "keys (?)",
        "aria-label": "keyboard shortcuts",
        onclick: showKeys,
      },
      "?",
    ),
  ]);
  const now = bar.querySelector("[aria-current]");
  if (now) now.scrollIntoView({ block: "nearest", inline: "nearest" }); // the bar of a narrow screen scrolls
}

// -- keys --

const KEYS = [
  ["1 – 6", "overview, steps, groups, rollouts, failures, compare"],
  ["j  k", "next, previous: row of a list, or rollout of the list"],
  ["h  l", "previous, next member of the group"],
  ["Enter", "open the selected row"],
  ["u", "back to the list"],
  ["g", "the group of this rollout"],
  ["c  t  w  x", "conversation, tokens, timing, record"],
  ["/", "search"],
  ["Esc", "leave a field, close this"],
  ["?", "this list"],
];

function showKeys() {
  let dialog = byId("keys");
  if (!dialog) {
    dialog = el(
      "dialog",
      { id: "keys" },
      el("h2", {}, "Keys"),
      el(
        "dl",
        { class: "pairs" },
        KEYS.map(([key, what]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)]),
      ),
      el("button", { type: "button", class: "plain", onclick: () => dialog.close() }, "close"),
    );
    document.body.append(dialog);
  }
  if (dialog.open) dialog.close();
  else dialog.showModal();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (act(event.key)) event.preventDefault();
}

function act(key) {
  if (/^[1-6]$/.test(key) && views()[Number(key) - 1]) return (go(`#${views()[Number(key) - 1][0]}`), true);
  if (key === "?") return (showKeys(), true);
  if (key === "/") {
    const field = byId("f-search") || byId("metric-search");
    if (field) field.focus();
    return Boolean(field);
  }
  if (current.table) return actOnList(current.table, key);
  if (current.view === "rollout" && current.rollout !== undefined) return actOnRollout(current.rollout, key);
  if (current.view === "group" && key === "u")
    return (go(context.from.startsWith("#groups") ? context.from : "#groups"), true);
  return false;
}

function actOnList(table, key) {
  if (key === "j" || key === "ArrowDown") return (table.move(1), true);
  if (key === "k" || key === "ArrowUp") return (table.move(-1), true);
  if (key === "Enter" && table.selected !== undefined) {
    const chosen = document.querySelector("#view .row.selected");
    if (chosen) chosen.click();
    return true;
  }
  return false;
}

function actOnRollout(i, key) {
  const tab = TABS.find(([, own]) => own === key);
  if (tab) return (go(tabLink(i, tab[0]), true), true);
  if (key === "j" || key === "k") return (neighbour(key === "j" ? 1 : -1), true);
  if (key === "h" || key === "l") return (neighbour(key === "l" ? 1 : -1, run.members(i)), true);
  if (key === "g") return (go(run.groupLink(i)), true);
  if (key === "u") return (go(context.from), true);
  return false;
}

// -- start --

async function start() {
  const view = byId("view");
  if (typeof DecompressionStream === "undefined") {
    return view.replaceChildren(
      el(
        "p",
        { class: "notice bad" },
        "This browser is too old to unpack the data (it lacks DecompressionStream). ",
        "Chrome 80, Firefox 113, Safari 16.4 or newer will do.",
      ),
    );
  }
  try {
    await run.load();
  } catch (error) {
    return view.replaceChildren(
      el(
        "p",
        { class: "notice bad" },
        `The data of this page is damaged: ${error.message}. Write the file again with trl-gym view.`,
      ),
    );
  }
  if (hasAddress)
    window.addEventListener("hashchange", () => {
      if (location.hash !== current.hash) show(location.hash);
    });
  else {
    document.addEventListener("click", followLinks);
    window.addEventListener("popstate", (event) => show(event.state ? event.state.hash : ""));
  }
  document.addEventListener("keydown", onKey);
  let narrow = isNarrow();
  window.addEventListener(
    "resize",
    perFrame(() => {
      if (isNarrow() !== narrow) {
        narrow = isNarrow();
        show(current.hash || "");
      }
    }),
  );
  if (hasAddress && history.state && history.state.scroll)
    current.scroll.set(location.hash, history.state.scroll); // where `reload` left it
  show(hasAddress ? location.hash : "");
  requestAnimationFrame(() => performance.mark("usable"));
  if (run.reload_s) setTimeout(reload, run.reload_s * 1000);
}

// -- a run that goes on: `trl-gym view --watch` writes the file again --

/** Reads the file again, at the same address and place; later while the page is being used or not seen. */
function reload() {
  const isUsed =
    document.hidden ||
    ["rollout", "group"].includes(current.view) || // what has ended does not change
    /^(INPUT|SELECT)$/.test(document.activeElement.tagName) ||
    document.querySelector("dialog[open]") ||
    !getSelection().isCollapsed;
  if (isUsed) return setTimeout(reload, 1000);
  history.replaceState({ scroll: scrollPlace() }, "");
  location.reload();
}

start();
