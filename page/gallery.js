"use strict";
// The gallery of questions with answers in columns: of conditions, or of models. What comes from data becomes text
// nodes alone: no markup is ever parsed. The state (filters, order, page) stands in the address; a change writes it
// there, and `hashchange` draws it.
{
  const find = (id) => document.getElementById(id);
  const { columns, filters, media, rows, total, right, words } = JSON.parse(find("data").textContent);
  // Pictures of the first page are in its markup and nowhere else.
  const drawn = [...document.querySelectorAll("image[id]")];
  const embedded = new Map(drawn.map((image) => [image.id, image.getAttribute("href")]));
  const SIZES = ["24", "48", "96"];

  /** An element with attributes and children; strings become text. */
  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat().filter((child) => child !== null));
    return element;
  }

  // What a question is asked for by the controls

  const isScored = (answer) => Boolean(answer) && answer.score !== null;
  const verdict = (answer) => (!isScored(answer) ? "unscored" : answer.score >= right ? "right" : "wrong");
  // The two columns that are set against each other: real and blind, or two models.
  const pair = words.pair.map((name) => columns.indexOf(name));
  const scores = (row) => pair.map((place) => row.answers[place]?.score ?? null);
  const difference = (row) => {
    const [first, second] = scores(row);
    return first === null || second === null ? null : first - second;
  };
  const normal = (text) => text.toLowerCase().split(/\s+/u).join(" ").trim();
  const LOOKS = {
    more: (row) => difference(row) > 0,
    both: (row) => scores(row).every((score) => score !== null && score >= right),
    less: (row) => difference(row) < 0,
    same: (row) => row.answers.filter(Boolean).length > 1 &&
      new Set(row.answers.filter(Boolean).map((answer) => normal(answer.text))).size === 1,
  };
  const negative = (value) => (value === null ? null : -value);
  const FIRST = "first"; // the order of the rows here, which is that of their interest
  const ORDERS = {
    [FIRST]: null,
    file: (row) => row.n,
    score: (row) => scores(row)[0],
    more: (row) => negative(difference(row)),
    less: difference,
    surprise: (row) => negative(new Map(row.perplexities).get(columns[Math.max(pair[0], 0)]) ?? null),
  };

  rows.forEach((row) => {
    const meta = new Map(row.meta);
    row.values = filters.map(([key]) => (key === "metric" && !meta.has(key) ? row.metric : meta.get(key)));
    row.verdicts = row.answers.map(verdict);
  });
  let searchable = null; // made at the first search

  function textOf(row) {
    const shown = [...row.media, ...row.instead.flatMap(([, places]) => places)].map((place) => media[place].path);
    const answers = row.answers.filter(Boolean).map((answer) => answer.text);
    const turns = row.turns.flatMap(([, parts]) => parts.filter((part) => typeof part === "string"));
    return [row.id, ...turns, ...row.references.map(([text]) => text), ...answers, ...row.choices,
      ...row.meta.flat(), ...shown].join("\n").toLowerCase();
  }

  // Controls: {name in the address, options: [[value, label]], test(row, value)}

  const controls = [
    { name: "look", options: Object.entries(words.looks), test: (row, value) => LOOKS[value](row) },
    ...columns.map((column, place) => ({
      name: `is.${column}`, label: column, options: ["right", "wrong", "unscored"].map((value) => [value, value]),
      test: (row, value) => row.verdicts[place] === value,
    })),
    ...filters.map(([key, values], place) => ({
      name: `g.${key}`, label: key, options: values.map((value) => [value, value]),
      test: (row, value) => row.values[place] === value,
    })),
  ];
  for (const control of controls) {
    if (control.name.startsWith("g.")) continue;
    control.options = control.options.filter(([value]) => rows.some((row) => control.test(row, value)));
  }

  function readState() {
    const parameters = new URLSearchParams(location.hash.slice(1));
    const state = { chosen: new Map(), search: parameters.get("q") || "", order: parameters.get("sort") };
    for (const control of controls) {
      const value = parameters.get(control.name);
      if (control.options.some(([option]) => option === value)) state.chosen.set(control.name, value);
    }
    if (!Object.hasOwn(ORDERS, state.order ?? "")) state.order = FIRST;
    state.size = SIZES.includes(parameters.get("size")) ? Number(parameters.get("size")) : Number(SIZES[0]);
    state.page = Math.max(1, Math.floor(Number(parameters.get("page"))) || 1);
    state.row = parameters.has("row") ? Number(parameters.get("row")) : null;
    return state;
  }

  let current = readState();

  /** Writes the state, changed, into the address, from where it is drawn. */
  function go(changes, replace = false) {
    const state = { ...current, page: 1, row: null, ...changes };
    const parameters = new URLSearchParams([...state.chosen]);
    if (state.search) parameters.set("q", state.search);
    if (state.order !== FIRST) parameters.set("sort", state.order);
    if (state.size !== Number(SIZES[0])) parameters.set("size", state.size);
    if (state.page > 1) parameters.set("page", state.page);
    const hash = `#${parameters.toString() || "all"}`;
    if (replace) location.replace(hash);
    else location.hash = hash;
  }

  function choose(name, value) {
    const chosen = new Map(current.chosen);
    if (value) chosen.set(name, value);
    else chosen.delete(name);
    go({ chosen });
  }

  /** The rows of a state, and for each option of each control how many there would be with it. */
  function select(state) {
    const terms = state.search.toLowerCase().split(/\s+/u).filter(Boolean);
    if (terms.length && searchable === null) searchable = new Map(rows.map((row) => [row, textOf(row)]));
    const counts = controls.map((control) => new Map(control.options.map(([value]) => [value, 0])));
    const any = controls.map(() => 0);
    const found = [];
    for (const row of rows) {
      if (!terms.every((term) => searchable.get(row).includes(term))) continue;
      const failing = controls.flatMap((control, place) =>
        state.chosen.has(control.name) && !control.test(row, state.chosen.get(control.name)) ? [place] : []);
      if (failing.length > 1) continue;
      if (!failing.length) found.push(row);
      for (const place of failing.length ? failing : controls.keys()) {
        any[place] += 1;
        for (const [value] of controls[place].options) {
          if (controls[place].test(row, value)) counts[place].set(value, counts[place].get(value) + 1);
        }
      }
    }
    const key = ORDERS[state.order];
    if (key) {
      const keys = new Map(found.map((row) => [row, key(row) ?? Infinity]));
      found.sort((a, b) => keys.get(a) - keys.get(b) || 0);
    }
    return { found, counts, any };
  }

  // Cards: as the macro `card` of the template makes them

  function pictures(places) {
    return make("div", { class: "media" }, places.map((place) => {
      const medium = media[place];
      const shown = medium.pictures.map((picture, number) => make("img", {
        src: picture.uri ?? embedded.get(`p${place}-${number}`), width: picture.width, height: picture.height,
        alt: picture.alt, class: picture.small ? "small" : null, decoding: "async",
      }));
      return make("figure", null,
        medium.error ? make("p", { class: "fault" }, medium.error) : null,
        shown.length ? make("div", { class: "frames" }, shown) : null,
        make("figcaption", null, [medium.path, ...medium.facts].join(" · ")));
    }));
  }

  function turn([role, parts], row) {
    const said = parts.map((part) => typeof part === "number"
      ? make("span", { class: "place" }, `${media[row.media[part - 1]].kind} ${part}`) : part);
    return make("div", { class: "turn" }, make("b", null, role), make("div", { class: "said", dir: "auto" }, said));
  }

  function mark(answer) {
    if (answer.score === null) return "";
    const name = verdict(answer);
    const sign = name === "right" ? "✓ right" : "✗ wrong";
    return answer.score > 0 && answer.score < 1 ? `${sign}, ${Number(answer.score.toFixed(2))}` : sign;
  }

  function answers(row) {
    const references = row.references.flatMap(([text, times], place) =>
      [(place ? " · " : "") + text, times > 1 ? make("span", { class: "times" }, ` ×${times}`) : null]);
    return make("table", { class: "answers" },
      make("tr", { class: "reference" }, make("th", { scope: "row" }, "reference"),
        make("td", { class: "said", dir: "auto" }, references), make("td", { class: "mark" }, row.metric)),
      row.answers.map((answer, place) => answer && make("tr", { class: row.verdicts[place] },
        make("th", { scope: "row" }, columns[place]), make("td", { class: "said", dir: "auto" }, answer.text),
        make("td", { class: "mark" }, mark(answer)))));
  }

  function choices(row) {
    if (!row.likelihoods.length) return null;
    const head = make("tr", null, make("th", { scope: "col" }, "log-probability per token"),
      row.likelihoods.map(([name]) => make("th", { scope: "col" }, name)));
    return make("table", { class: "choices" }, head, row.choices.map((choice, place) => make("tr", null,
      make("th", { scope: "row" }, (place === row.right_choice ? "✓ " : "") + choice),
      row.likelihoods.map(([, values]) => make("td", { class: values[place] === Math.max(...values) ? "best" : null },
        values[place].toFixed(2))))));
  }

  function card(row) {
    const instead = row.instead.map(([column, places]) => {
      const details = make("details", null, make("summary", null, `Shown instead: ${column}`));
      details.addEventListener("toggle", () => details.append(pictures(places)), { once: true });
      return details;
    });
    const perplexities = row.perplexities.map(([name, value]) => `${name} ${value}`).join(", ");
    return make("article", { class: "card" },
      make("h3", null, make("a", { href: `#row=${row.n}` }, row.id)),
      make("div", { class: "beside" }, row.media.length ? pictures(row.media) : null,
        make("div", { class: "body" }, row.turns.map((one) => turn(one, row)), answers(row), choices(row))),
      instead,
      make("p", null, row.meta.map(([key, value]) => make("span", { class: "badge" }, `${key} ${value}`)),
        perplexities ? make("span", { class: "perplexity" }, `perplexity of the reference: ${perplexities}`) : null));
  }

  // The page

  const questions = (count) => `${count.toLocaleString("en")} question${count === 1 ? "" : "s"}`;
  const selects = new Map();
  let turned = false; // by the pager, which stands below what it changes

  function option(value, label) {
    return make("option", { value }, label);
  }

  function labelled(text, control) {
    return make("label", null, text, control);
  }

  function build() {
    const form = find("filters");
    const looks = make("div", { class: "looks", role: "group", "aria-label": `${words.pair.join(" and ")} compared` });
    for (const [value, label] of controls[0].options) {
      const button = make("button", { type: "button", value }, label);
      button.addEventListener("click", () => choose("look", current.chosen.get("look") === value ? "" : value));
      looks.append(button);
    }
    if (controls[0].options.length) form.append(looks);
    selects.set("look", looks);
    for (const control of controls.slice(1)) {
      if (!control.options.length) continue;
      const options = [["", "all"], ...control.options].map((one) => option(...one));
      const menu = make("select", { name: control.name }, options);
      menu.addEventListener("change", () => choose(control.name, menu.value));
      selects.set(control.name, menu);
      form.append(labelled(control.label, menu));
    }
    const orders = make("select", { id: "order" }, Object.entries(ORDERS)
      .filter(([, key]) => key === null || rows.some((row) => key(row) !== null))
      .map(([value]) => option(value, words.orders[value])));
    orders.addEventListener("change", () => go({ order: orders.value }));
    const sizes = make("select", { id: "size" }, SIZES.map((size) => option(size, size)));
    sizes.addEventListener("change", () => go({ size: Number(sizes.value) }));
    let waiting = null;
    const search = find("search");
    search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => go({ search: search.value }, true), 150);
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    find("status").after(labelled("order", orders), labelled("on a page", sizes), ...pager(false));
    find("below").append(...pager(true));
    form.hidden = find("status").hidden = find("keys").hidden = false;
  }

  function pager(below) {
    const button = (label, name, action) => {
      const made = make("button", { type: "button", class: name }, label);
      made.addEventListener("click", action);
      return made;
    };
    const step = (by) => () => {
      turned = below;
      go({ page: current.page + by });
    };
    const clear = button("Clear filters", "clear", () => go({ chosen: new Map(), search: "", order: FIRST }));
    return [...(below ? [] : [clear]), button("← Previous", "previous", step(-1)), button("Next →", "next", step(1))];
  }

  function draw() {
    const state = current;
    const { found, counts, any } = select(state);
    const single = rows.find((row) => row.n === state.row);
    const pages = Math.max(1, Math.ceil(found.length / state.size));
    const page = (state.page = Math.min(state.page, pages));
    const start = (page - 1) * state.size;
    const shown = single ? [single] : found.slice(start, start + state.size);
    find("cards").replaceChildren(...(shown.length ? shown.map(card)
      : [make("p", { class: "empty" }, "No question fits all of these filters.")]));
    const [here, all] = [rows.length, total].map((count) => count.toLocaleString("en"));
    const held = here === all ? "" : ` The gallery holds ${here} of ${all}.`;
    const [from, to] = [start + 1, start + shown.length].map((number) => number.toLocaleString("en"));
    const span = found.length ? `${from}–${to} of ` : "";
    const others = found.length < rows.length ? ` (out of ${here})` : "";
    find("status").textContent = single
      ? `One of ${questions(rows.length)}.`
      : `${span}${questions(found.length)}${others}, page ${page} of ${pages}.${held}`;
    for (const button of document.querySelectorAll(".previous")) button.disabled = Boolean(single) || page <= 1;
    for (const button of document.querySelectorAll(".next")) button.disabled = Boolean(single) || page >= pages;
    document.querySelector(".clear").disabled = !single && !state.chosen.size && !state.search && state.order === FIRST;
    if (document.activeElement !== find("search")) find("search").value = state.search;
    find("order").value = state.order;
    find("size").value = String(state.size);
    controls.forEach((control, place) => {
      const menu = selects.get(control.name);
      if (!menu) return;
      const chosen = state.chosen.get(control.name) ?? "";
      control.options.forEach(([value, label], number) => {
        const text = `${label} (${counts[place].get(value).toLocaleString("en")})`;
        const shownAt = menu.children[control.name === "look" ? number : number + 1];
        shownAt.textContent = text;
        if (control.name === "look") shownAt.setAttribute("aria-pressed", String(chosen === value));
      });
      if (control.name !== "look") {
        menu.children[0].textContent = `all (${any[place].toLocaleString("en")})`;
        menu.value = chosen;
      }
    });
    if (turned) find("gallery").scrollIntoView();
    turned = false;
  }

  build();
  draw();
  addEventListener("hashchange", () => {
    if (document.getElementById(location.hash.slice(1))) return; // a jump to a part of the page, which keeps the state
    current = readState();
    draw();
  });
  document.addEventListener("click", (event) => {
    // A figure that leads to its questions; the address may be the same as before.
    if (event.target.closest?.('a[href*="="]')) {
      turned = true;
      if (event.target.closest("a").getAttribute("href") === location.hash) find("gallery").scrollIntoView();
    }
  });
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") {
      event.preventDefault();
      find("search").focus();
    } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const button = document.querySelector(event.key === "ArrowLeft" ? ".previous" : ".next");
      if (!button.disabled) button.click();
    }
  });
  if (location.hash.includes("=")) find("gallery").scrollIntoView();
}
