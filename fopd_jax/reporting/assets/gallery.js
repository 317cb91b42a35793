// The same prompt and noise side by side: sorted by what one model gains over another, filtered, enlarged.

const PAGE = 24; // rows at once

function gallerySection() {
  if (!DATA.galleries.length) return null;
  const body = section(
    "gallery",
    "Gallery",
    "The same prompt and the same noise by every model. Sort by a difference to see where one loses to another.",
  );
  const names = () => DATA.galleries.map(titleOf);
  const local = {
    which: names()[0],
    skill: "",
    one: "",
    other: "",
    sort: "loss",
    text: "",
    tag: "",
    only: "all",
    count: PAGE,
  };
  const current = () => DATA.galleries.find((each) => titleOf(each) === local.which) ?? DATA.galleries[0];
  const again = (change) => (value) => {
    change(value);
    local.count = PAGE;
    list.redraw();
  };

  const which = choice(
    "Suite",
    names(),
    local.which,
    again((value) => {
      local.which = value;
      offer();
    }),
  );
  const skill = choice(
    "Score",
    [],
    "",
    again((value) => {
      local.skill = value;
    }),
  );
  const one = choice(
    "Model",
    [],
    "",
    again((value) => {
      local.one = value;
    }),
  );
  const other = choice(
    "against",
    [],
    "",
    again((value) => {
      local.other = value;
    }),
  );
  const sort = choice(
    "Sort",
    [
      ["loss", "largest losses first"],
      ["gain", "largest gains first"],
      ["worst", "lowest scores first"],
      ["best", "highest scores first"],
      ["order", "order of the suite"],
    ],
    "loss",
    again((value) => {
      local.sort = value;
    }),
  );
  const only = choice(
    "Only",
    [
      ["all", "all"],
      ["losses", "losses"],
      ["gains", "gains"],
      ["failed", "failed scores"],
    ],
    "all",
    again((value) => {
      local.only = value;
    }),
  );
  const tag = choice(
    "Tag",
    [],
    "",
    again((value) => {
      local.tag = value;
    }),
  );
  const text = el("input", {
    type: "search",
    id: "filter",
    placeholder: "words of a prompt",
    on: {
      input: again(() => {
        local.text = text.value.toLowerCase();
      }),
    },
  });

  function offer() {
    const { skills, models, rows } = current();
    if (!skills.includes(local.skill)) local.skill = skills[0] ?? "";
    if (!models.includes(local.one))
      local.one =
        models.find((name) => /student/i.test(name)) ??
        models.find((name) => run(name)?.stage === "opd") ??
        models.find((name) => run(name)) ??
        models.find((name) => !/^base|teacher/i.test(name)) ??
        models[models.length - 1];
    if (!models.includes(local.other))
      local.other =
        models.find((name) => /teacher/i.test(name) && name !== local.one) ??
        models.find((name) => name !== local.one) ??
        local.one;
    const tags = [
      ...new Set(rows.flatMap((row) => Object.entries(row.tags).map(([name, value]) => `${name}: ${value}`))),
    ].sort();
    if (!tags.includes(local.tag)) local.tag = "";
    which.select.offer(names(), local.which);
    skill.select.offer(skills, local.skill);
    one.select.offer(models, local.one);
    other.select.offer(models, local.other);
    tag.select.offer([["", "any"], ...tags], local.tag);
    tag.hidden = tags.length < 2 || tags.length > 300;
    which.hidden = DATA.galleries.length < 2;
    other.hidden = only.hidden = models.length < 2;
  }

  const scoreOf = (row, model) => row.models[model]?.scores[local.skill];
  const lead = (row) => {
    const a = scoreOf(row, local.one),
      b = scoreOf(row, local.other);
    return a === undefined || b === undefined || local.one === local.other ? null : a - b;
  };
  function chosen() {
    const words = local.text.split(/\s+/).filter(Boolean);
    const keep = {
      all: () => true,
      losses: (row) => lead(row) !== null && lead(row) < 0,
      gains: (row) => lead(row) !== null && lead(row) > 0,
      failed: (row) => Object.values(row.models).some((shown) => local.skill in (shown.failed ?? {})),
    }[local.only];
    const rows = current().rows.filter(
      (row) =>
        keep(row) &&
        words.every((word) => row.prompt.toLowerCase().includes(word)) &&
        (!local.tag || Object.entries(row.tags).some(([name, value]) => `${name}: ${value}` === local.tag)),
    );
    const by = {
      loss: lead,
      gain: (row) => (lead(row) === null ? null : -lead(row)),
      worst: (row) => scoreOf(row, local.one),
      best: (row) => {
        const value = scoreOf(row, local.one);
        return value === undefined ? null : -value;
      },
    }[local.sort];
    return by ? [...rows].sort((a, b) => compare(by(a), by(b))) : rows;
  }

  let shown = [];
  const list = within(() => {
    const gallery = current();
    shown = chosen();
    const loses = shown.filter((row) => (lead(row) ?? 0) < 0).length,
      gains = shown.filter((row) => (lead(row) ?? 0) > 0).length;
    const said =
      local.one !== local.other && local.skill
        ? `; of them ${local.one} scores lower than ${local.other} on ${show(loses)}, higher on ${show(gains)}`
        : "";
    return [
      gallery.note && el("p", { className: "warning" }, gallery.note),
      el(
        "p",
        { className: "small", role: "status" },
        `${plural(shown.length, "row")} of ${show(gallery.total)}${said}.`,
      ),
      shown.length
        ? el("div", { className: "pairs" }, ...shown.slice(0, local.count).map((row, at) => pairOf(gallery, row, at)))
        : nothing("Nothing matches."),
      shown.length > local.count &&
        el(
          "p",
          { className: "more-row" },
          el(
            "button",
            {
              type: "button",
              on: {
                click: () => {
                  local.count += PAGE;
                  list.redraw();
                },
              },
            },
            `Show ${show(Math.min(PAGE, shown.length - local.count))} more`,
          ),
        ),
    ];
  });

  function pairOf(gallery, row, at) {
    const difference = lead(row);
    return el(
      "article",
      { className: "pair", "aria-label": row.prompt },
      difference !== null &&
        el(
          "span",
          { className: "gap", tip: `${local.one} minus ${local.other}, ${local.skill}` },
          score(difference, true),
        ),
      el(
        "h3",
        {},
        row.prompt,
        row.sample ? el("small", {}, ` · sample ${row.sample + 1}`) : null,
        el(
          "span",
          { className: "tags" },
          ...Object.entries(row.tags).map(([name, value]) => el("span", { title: name }, value)),
        ),
      ),
      strip(gallery, row, (model) => enlarge(gallery, at, model)),
    );
  }

  function strip(gallery, row, pressed) {
    const models = gallery.models.filter(visible).sort((a, b) => rank(a) - rank(b));
    const values = models.map((model) => scoreOf(row, model)).filter((value) => value !== undefined);
    const most = values.length > 1 && Math.min(...values) < Math.max(...values) ? Math.max(...values) : NaN;
    return el(
      "div",
      { className: "strip" },
      ...models.map((model) => {
        const of = row.models[model];
        const picture = of?.image
          ? image(of.image, `${model}: ${row.prompt}`)
          : el("span", { className: "none" }, of ? "no image" : "not made");
        return el(
          "figure",
          {},
          el(
            "button",
            { type: "button", "aria-label": `Enlarge ${model}: ${row.prompt}`, on: { click: () => pressed?.(model) } },
            picture,
          ),
          el(
            "figcaption",
            {},
            key(model),
            el(
              "ul",
              {},
              ...Object.entries(of?.scores ?? {})
                .sort(([a], [b]) => (b === local.skill) - (a === local.skill))
                .map(([name, value]) =>
                  el(
                    "li",
                    {
                      className: `${name === local.skill ? "key-score" : ""}${name === local.skill && value === most ? " top" : ""}`,
                    },
                    el("span", {}, name),
                    el("span", {}, score(value)),
                  ),
                ),
              ...Object.entries(of?.failed ?? {}).map(([name, why]) =>
                el("li", { title: why }, el("span", {}, name), el("span", {}, "failed")),
              ),
            ),
          ),
        );
      }),
    );
  }
  const rank = (model) => (model === local.one ? 0 : model === local.other ? 1 : 2);

  // ---- one row, large
  const viewer = document.getElementById("viewer");
  function enlarge(gallery, at) {
    const row = shown[at];
    const step = (by) => {
      if (shown[at + by]) enlarge(gallery, at + by);
    };
    fill(
      viewer,
      el(
        "div",
        { className: "controls" },
        el(
          "span",
          { className: "segments" },
          el("button", { type: "button", disabled: at === 0, on: { click: () => step(-1) } }, "← Previous"),
          el("button", { type: "button", disabled: at === shown.length - 1, on: { click: () => step(1) } }, "Next →"),
        ),
        el("small", {}, `${show(at + 1)} of ${show(shown.length)}`),
        el("button", { type: "button", on: { click: () => viewer.close() } }, "Close"),
      ),
      el("h3", {}, row.prompt),
      strip(gallery, row),
    );
    viewer.onkeydown = (event) => {
      if (event.key === "ArrowLeft") step(-1);
      else if (event.key === "ArrowRight") step(1);
    };
    if (!viewer.open) viewer.showModal();
  }

  offer();
  body.append(
    el("div", { className: "controls" }, which, skill, one, other, sort, only, tag, el("label", {}, "Prompt", text)),
    list,
  );
  return () => {
    offer();
    list.redraw();
  };
}
