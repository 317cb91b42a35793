// Charts: drawn by the library once they are in view, and again when something about them has changed.

const alive = new Map(); // canvas → its chart
const waiting = new Map(); // canvas → what makes its configuration
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      const make = waiting.get(entry.target);
      if (!entry.isIntersecting || !make) continue;
      waiting.delete(entry.target);
      watcher.unobserve(entry.target);
      alive.set(entry.target, new Chart(entry.target, make()));
    }
  },
  { rootMargin: "200px" },
);

function dropCharts(within) {
  for (const canvas of within.querySelectorAll("canvas")) {
    alive.get(canvas)?.destroy();
    alive.delete(canvas);
    waiting.delete(canvas);
    watcher.unobserve(canvas);
  }
}

// A card with a chart; `said`: what it shows, in words.
function plot(title, make, said, { tall = false, note = "" } = {}) {
  const canvas = el("canvas", { role: "img", "aria-label": `${title}. ${said}` });
  waiting.set(canvas, make);
  watcher.observe(canvas);
  return el(
    "div",
    { className: "card" },
    el("h3", {}, title),
    el("div", { className: `plot${tall ? " tall" : ""}` }, canvas),
    note && el("p", { className: "small" }, note),
  );
}

const AXES = { images: "images seen", steps: "steps", hours: "hours of updates" };
function axisOptions() {
  const timed = DATA.runs.some((each) => each.clock.x?.length),
    sized = DATA.runs.some((each) => each.images);
  return Object.entries(AXES)
    .filter(([name]) => (name === "images" ? sized : name === "hours" ? timed : true))
    .map(([name, title]) => [name, title]);
}

function place(name, step) {
  const of = run(name);
  if (state.axis === "images") return of.images ? step * of.images : null;
  if (state.axis === "hours") return interpolate(of.clock, step);
  return step;
}

function interpolate({ x, y } = {}, at) {
  if (!x?.length) return null;
  let high = x.findIndex((each) => each >= at);
  if (high < 0) return y[y.length - 1];
  if (high === 0) return x[0] ? (y[0] * at) / x[0] : 0;
  return y[high - 1] + ((y[high] - y[high - 1]) * (at - x[high - 1])) / (x[high] - x[high - 1]);
}

function smooth(values, weight) {
  // Exponential mean without its bias to the first value, as TensorBoard has it.
  if (!weight) return values;
  let mean = 0,
    count = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    count += 1;
    return mean / (1 - weight ** count);
  });
}

function line(name, points, more = {}) {
  const few = points.length < 30,
    shown = colour(name);
  return {
    label: name,
    data: points,
    borderColor: shown,
    backgroundColor: shown,
    borderWidth: few ? 2 : 1.6,
    borderDash: dash(name),
    tension: 0,
    spanGaps: false,
    pointStyle: shape(name),
    pointRadius: few ? 3.5 : points.map((_, at) => (at === points.length - 1 ? 4 : 0)),
    pointHoverRadius: 5,
    pointHitRadius: 8,
    ...more,
  };
}

function curveOf(metric, name, weight = 0) {
  const { x, y } = DATA.curves[metric][name];
  const shown = smooth(y, weight);
  return x.map((step, at) => ({ x: place(name, step), y: shown[at], step })).filter((point) => point.x !== null);
}

const runsWith = (metric) =>
  DATA.runs.map((each) => each.name).filter((name) => visible(name) && DATA.curves[metric]?.[name]);
const latest = (metric) =>
  runsWith(metric)
    .map((name) => {
      const { x, y } = DATA.curves[metric][name];
      return `${name}: ${show(y[y.length - 1])} at step ${x[x.length - 1]}`;
    })
    .join("; ");

function settings({
  xTitle = "",
  yTitle = "",
  log = false,
  logX = false,
  legend = false,
  min,
  indexAxis = "x",
  ticks = {},
  tooltip = {},
} = {}) {
  const grid = { color: ink("--line"), drawTicks: false },
    text = ink("--soft");
  const scale = (title, type, more) => ({
    type,
    grid,
    border: { display: false },
    title: { display: Boolean(title), text: title, color: text, font: { size: 11 } },
    ticks: { color: text, padding: 6, maxRotation: 0, autoSkipPadding: 14, font: { size: 11 }, ...more },
  });
  const short = (value) =>
    Math.abs(value) >= 1000
      ? value.toLocaleString("en", { notation: "compact", maximumFractionDigits: 1 })
      : Number(value.toPrecision(4)).toString();
  return {
    responsive: true,
    maintainAspectRatio: false,
    animation: false,
    indexAxis,
    normalized: false,
    interaction: { mode: "nearest", intersect: false, axis: "x" },
    layout: { padding: { right: 6 } },
    scales: {
      x: { ...scale(xTitle, logX ? "logarithmic" : "linear", { callback: short, maxTicksLimit: 7 }) },
      y: {
        ...scale(yTitle, log ? "logarithmic" : "linear", { callback: short, maxTicksLimit: 6, ...ticks }),
        min: log ? undefined : min,
      },
    },
    plugins: {
      legend: {
        display: legend,
        position: "bottom",
        labels: { color: ink("--ink"), usePointStyle: true, boxHeight: 7, font: { size: 11 } },
      },
      tooltip: {
        backgroundColor: ink("--ink"),
        titleColor: ink("--sheet"),
        bodyColor: ink("--sheet"),
        usePointStyle: true,
        boxPadding: 4,
        padding: 9,
        ...tooltip,
      },
    },
  };
}

function lineChart(datasets, options = {}) {
  const tooltip = {
    callbacks: {
      title: (items) =>
        items[0]?.raw.step !== undefined ? `step ${show(items[0].raw.step)}` : (items[0]?.raw.title ?? ""),
      label: (item) => ` ${item.dataset.label}: ${score(item.raw.y)}`,
    },
  };
  return () => ({ type: "line", data: { datasets: datasets() }, options: settings({ tooltip, ...options }) });
}

// Intervals of bars, which the library has none of: a line over each bar from `low` to `high` of its data.
const whiskers = {
  id: "whiskers",
  afterDatasetsDraw(chart) {
    const { ctx } = chart;
    ctx.save();
    ctx.strokeStyle = ink("--ink");
    ctx.lineWidth = 1.4;
    chart.data.datasets.forEach((dataset, index) =>
      chart.getDatasetMeta(index).data.forEach((bar, at) => {
        const range = dataset.ranges?.[at];
        if (!range || range[0] === null || range[0] === undefined) return;
        const [from, to] = range.map((value) => chart.scales.x.getPixelForValue(value));
        ctx.beginPath();
        ctx.moveTo(from, bar.y);
        ctx.lineTo(to, bar.y);
        for (const end of [from, to]) {
          ctx.moveTo(end, bar.y - 4);
          ctx.lineTo(end, bar.y + 4);
        }
        ctx.stroke();
      }),
    );
    ctx.restore();
  },
};

function barChart(rows, skill) {
  const of = rows.map((row) => row.cells[skill] ?? {});
  return () => {
    const options = settings({
      indexAxis: "y",
      tooltip: { callbacks: { label: (item) => cellTip(rows[item.dataIndex], skill, of[item.dataIndex]).split("\n") } },
    });
    options.scales.y = {
      type: "category",
      grid: { display: false },
      border: { display: false },
      ticks: {
        color: ink("--ink"),
        font: { size: 11 },
        autoSkip: false,
        callback(value) {
          const name = this.getLabelForValue(value);
          return name.length > 24 ? `${name.slice(0, 23)}…` : name;
        },
      },
    };
    options.scales.x.beginAtZero = true;
    options.interaction = { mode: "nearest", intersect: false, axis: "y" };
    return {
      type: "bar",
      plugins: [whiskers],
      options,
      data: {
        labels: rows.map((row) => row.label),
        datasets: [
          {
            data: of.map((cell) => cell.mean ?? null),
            ranges: of.map((cell) => [cell.low, cell.high]),
            borderRadius: 4,
            barPercentage: 0.82,
            categoryPercentage: 0.9,
            backgroundColor: rows.map((row) => faded(colour(row.entity), row.entity ? 0.85 : 0.45)),
          },
        ],
      },
    };
  };
}

function radarChart(rows, skills) {
  // Each axis goes from 0 to the best of its skill, so that skills of any unit share one picture.
  const best = skills.map((skill) => Math.max(...rows.map((row) => row.cells[skill]?.mean ?? -Infinity)));
  return () => {
    const soft = ink("--soft"),
      grid = ink("--line"),
      base = settings({ legend: true });
    return {
      type: "radar",
      data: {
        labels: skills,
        datasets: rows.map((row) => ({
          label: row.label,
          data: skills.map((skill, at) =>
            row.cells[skill]?.mean === undefined ? null : row.cells[skill].mean / best[at],
          ),
          borderColor: colour(row.entity),
          backgroundColor: faded(colour(row.entity), 0.06),
          borderWidth: 2,
          borderDash: row.entity ? dash(row.entity) : [4, 3],
          pointStyle: shape(row.entity),
          pointRadius: 3.5,
          pointBackgroundColor: colour(row.entity),
          pointBorderColor: colour(row.entity),
        })),
      },
      options: {
        ...base,
        scales: {
          r: {
            min: 0,
            max: 1,
            grid: { color: grid },
            angleLines: { color: grid },
            pointLabels: { color: ink("--ink"), font: { size: 12 } },
            ticks: { color: soft, backdropColor: "transparent", callback: percent, maxTicksLimit: 5 },
          },
        },
        interaction: { mode: "nearest", intersect: false },
        plugins: {
          ...base.plugins,
          tooltip: {
            ...base.plugins.tooltip,
            callbacks: {
              label: (item) =>
                ` ${item.dataset.label}: ${score(rows[item.datasetIndex].cells[skills[item.dataIndex]]?.mean)} (${percent(item.raw)} of the best)`,
            },
          },
        },
      },
    };
  };
}
