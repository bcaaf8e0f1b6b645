// The pictures: each takes the rows that pass the filters and returns its panels.
"use strict";
const nameOf = ({ family, layout }) => `${family}, ${layout}`;

// A case's name without the words that all of them share.
function brief(names) {
  const words = names.map(name => name.split("-"));
  return words.map(of => of.filter((word, i) => names.length === 1 || words.some(other => other[i] !== word)).join(" "));
}

const PICTURES = {
  heat(list) {
    const { speedup, name } = time(), method = chosen("method") || data.kernels[0];
    const cells = list.filter(row => row.method === method && row[speedup]);
    return [...groups(cells, nameOf)].map(([group, of]) => {
      const shape = row => `H${row.H} D${row.D}/${row.Dv}`, column = row => `${row.L} ${row.N}`;
      const shapes = [...groups([...of].sort((a, b) => b.H - a.H || b.D - a.D || b.Dv - a.Dv), shape).keys()];
      const columns = [...groups([...of].sort((a, b) => a.L - b.L || a.N - b.N), column).keys()];
      const values = [...groups(of, row => `${shape(row)}|${column(row)}`)].map(([key, same]) => {
        const [y, x] = key.split("|");
        const at = mean([columns.indexOf(x), shapes.indexOf(y)], same, speedup, "lowest", "x");
        const [, , text] = HEAT.findLast(([from]) => at.value[2] >= from);
        return { ...at, label: { color: text } };
      });
      const first = new Set(columns.map(text => columns.find(other => other.split(" ")[0] === text.split(" ")[0])));
      const labels = text => `${text.split(" ")[1]}` + (first.has(text) ? `\n{L|L ${text.split(" ")[0]}}` : "");
      const series = { type: "heatmap", data: values, emphasis: { itemStyle: { borderColor: variable("--fg") } },
        label: { show: true, fontSize: 10, formatter: ({ value }) => value[2].toFixed(value[2] < 9.95 ? 1 : 0) },
        itemStyle: { borderColor: variable("--bg"), borderWidth: 1 } };
      const x = axis("category", "N, and below it L", { data: columns, nameGap: 42,
        axisLabel: { interval: 0, fontSize: 9, formatter: labels, hideOverlap: false,
          rich: { L: { fontSize: 10, fontWeight: 700, padding: [3, 0, 0, 0], color: variable("--fg") } } } });
      const more = { legend: { show: false }, grid: { left: 8, right: 12, top: 28, bottom: 8 },
        visualMap: { show: false, type: "piecewise", dimension: 2,
          pieces: HEAT.map(([from, color], i) => ({ gte: from, lt: HEAT[i + 1]?.[0], color })) } };
      return { height: 100 + 24 * shapes.length, least: 90 + 27 * columns.length,
        option: chart(`${group}: ${label(method)}, ${name}`, [series], x, axis("category", "", { data: shapes }), more) };
    });
  },

  speedup(list) {
    const { speedup, name } = time(), asked = chosen("family") || rows[0].family;
    const wanted = chosen("method") ? [chosen("method")] : data.kernels;
    const cases = wanted.flatMap(method => list.filter(row => row.family === asked && row[speedup] && row.method === method));
    return [...groups(cases, row => `${label(row.method)}: ${nameOf(row)}, ${name}`)].map(([title, of]) => {
      const series = distinct(of, "N").flatMap((n, i) => {
        const those = of.filter(row => row.N === n), style = { color: colour(i) };
        const line = distinct(those, "L").map(L => mean([L], those.filter(row => row.L === L), speedup, "lowest", "x"));
        return [
          { type: "line", name: `N = ${n}`, data: line, symbol: symbol(i), symbolSize: 7, itemStyle: style, z: 3 },
          { type: "scatter", name: `N = ${n}`, symbolSize: 5, itemStyle: { ...style, opacity: 0.4 },
            data: those.map(row => point([row.L, row[speedup]], row)) },
        ];
      });
      const from = data.thresholds[of[0].method];
      series[0].markLine = guide([{ yAxis: data.needed }], variable("--fg"));
      if (from) series[0].markLine.data.push({ xAxis: from, lineStyle: { type: "dotted" } });
      return { height: 300, option: chart(title, series, axis("log", "L"), axis("log", "", { axisLabel: {
        formatter: value => `${value}x` } })) };
    });
  },

  bytes(list) {
    const { us, name } = time();
    const cases = list.filter(row => row.family !== "prefill" && row.bytes && row[us]);
    const series = methods.flatMap((method, i) => {
      const of = cases.filter(row => row.method === method);
      return of.length ? [{ type: "scatter", name: label(method), symbol: symbol(i), symbolSize: 5,
        itemStyle: { color: colour(i), opacity: 0.65 }, data: of.map(row => point([row.bytes / 1e6, row[us]], row)) }] : [];
    });
    if (!series.length) return [];
    if (data.limit.length) series.push({ type: "line", name: "read limit", symbol: "none", silent: true, z: 4,
      itemStyle: { color: variable("--fg") }, lineStyle: { width: 2 }, data: data.limit.map(([b, t]) => [b / 1e6, t]) });
    return [{ height: 460, option: chart(`${name} (µs) against distinct bytes (MB)`, series,
      axis("log", "MB", { logBase: 10 }), axis("log", "")) }];
  },

  decode(list) {
    const { us, name } = time();
    const cases = list.filter(row => row.family === "decode" && row.scope === "op" && row[us]);
    return distinct(cases, "N").map(n => {
      const series = methods.flatMap((method, i) => {
        const of = cases.filter(row => row.N === n && row.method === method);
        const line = distinct(of, "L").map(L => mean([L], of.filter(row => row.L === L), us, "slowest", " µs"));
        return line.length ? [{ type: "line", name: label(method), data: line, symbol: symbol(i), symbolSize: 7,
          itemStyle: { color: colour(i) } }] : [];
      });
      return { height: 320, option: chart(`N = ${n} rows: ${name} (µs)`, series, axis("log", "L"), axis("log", "")) };
    });
  },

  prefill(list) {
    const { us, name } = time(), known = new Set(list.map(row => row.case));
    const borrowed = lent.filter(row => known.has(row.case) && (!chosen("method") || row.method === chosen("method")));
    const cases = [...list, ...borrowed].filter(row => row.family === "prefill" && row.scope === "op");
    const panel = (value, title, unit) => {
      const of = cases.filter(row => row[value]);
      const slowest = groups([...of].sort((a, b) => a.device_us - b.device_us), row => row.case);
      const names = [...slowest.keys()], texts = brief(names);
      const series = methods.flatMap((method, i) => {
        const those = of.filter(row => row.method === method);
        return those.length ? [{ type: "scatter", name: label(method), symbol: symbol(i), symbolSize: 10,
          itemStyle: { color: colour(i) }, data: those.map(row => point([row[value], names.indexOf(row.case)], row,
            ...(row.number === undefined ? [`measured in ${data.lender}`] : []))) }] : [];
      });
      return names.length ? [{ height: 110 + 19 * names.length, option: chart(title, series, axis("log", unit),
        axis("category", "", { data: texts, axisLabel: { fontSize: 10 }, splitLine: { show: true,
          lineStyle: { color: variable("--line"), opacity: 0.5 } } })) }] : [];
    };
    return [...panel(us, `${name} (µs)`, "µs"), ...panel("tflops", "TFLOP/s of the selected work, device time", "TFLOP/s")];
  },

  sharing(list) {
    const cases = list.filter(row => row.union && row.rows_us && row.tiles_us);
    const kinds = [["row kernel", "rows_us"], ["shared", "tiles_us"], [label("triton"), "device_us"]];
    return [...groups(cases, row => `H=${row.H}, N=${row.N}, L=${row.L}`)].flatMap(([title, of]) => {
      if (of.length < 3) return [];
      const inOrder = [...of].sort((a, b) => a.union - b.union);
      const series = kinds.map(([name, us], i) => ({ type: "line", name, symbol: symbol(i), symbolSize: 7,
        itemStyle: { color: colour(i) }, data: inOrder.map(row => ({ ...point([row.union, row[us]], row),
          said: () => [row.case, `${short(row.union)} tiles per query tile, ${name} ${short(row[us])} µs`,
            `${Math.round(100 * (row.shared ?? 0))} % of the query tiles share`] })) }));
      return [{ height: 320, option: chart(`${title}: device time (µs)`, series, axis("log", "KV tiles per query tile"),
        axis("log", "")) }];
    });
  },

  changes(list) {
    const known = new Set(list.map(row => row.number));
    const series = Object.entries(GRADES).flatMap(([grade, [fill, size]]) => {
      const of = data.changes.filter(([number, , , , found]) => found === grade && known.has(number));
      return of.length ? [{ type: "scatter", name: grade, symbolSize: size, itemStyle: { color: fill, opacity: 0.75 },
        data: of.map(([number, before, after, change]) => ({ number, value: [before, 100 * change],
          said: () => [rows[number].case, label(rows[number].method), `${short(before)} µs → ${short(after)} µs`,
            `${change < 0 ? "" : "+"}${(100 * change).toFixed(1)} %, ${grade}`] })) }] : [];
    });
    if (!series.length) return [];
    series[0].markLine = guide([{ yAxis: 100 * data.slower }, { yAxis: 0, lineStyle: { type: "solid", width: 1 } }],
      variable("--soft"));
    return [{ height: 360, option: chart("change in %, against the old time in µs", series,
      axis("log", "µs, old"), axis("value", "")) }];
  },

  history(list) {
    const { runs, rows: numbers, time: times, speedup } = data.history;
    const method = chosen("method") || data.kernels[0], place = runs.findIndex(run => run.reported);
    const known = new Set(list.filter(row => row.method === method).map(row => row.number));
    const at = numbers.flatMap((number, i) => (known.has(number) ? [i] : []));
    if (!at.length || runs.length < 2) return [];
    const panel = (title, values, scale, unit) => {
      const series = [...groups(at, i => rows[numbers[i]].family)].map(([family, of], i) => ({
        type: "line", name: family, symbol: "circle", itemStyle: { color: colour(i) }, symbolSize: 9, connectNulls: true,
        data: runs.map((run, x) => {
          const both = of.filter(j => values[x][j] && values[place][j]);
          if (!both.length) return null;
          const ratio = geomean(both.map(j => values[x][j] / values[place][j]));
          return { value: [x, ratio * scale(of.filter(j => values[place][j]).map(j => values[place][j]))],
            itemStyle: run.card === runs[place].card ? {} : { color: variable("--bg"), borderColor: colour(i), borderWidth: 2 },
            said: () => [`${run.name}, ${run.when}`, `commit ${run.commit || "unknown"}`, `card ${run.card}`,
              `${family}: ${both.length} cases, geomean ${short(geomean(both.map(j => values[x][j])))}${unit},`
              + ` ${ratio.toFixed(3)} of the reported run's`] };
        }),
      })).filter(one => one.data.some(Boolean));
      const names = runs.map(run => `${run.commit.slice(0, 7) || run.name}\n${run.when.slice(5, 10)}`);
      return series.length ? [{ height: 320, option: chart(title, series, axis("category", "", { data: names }),
        axis("value", "", { scale: true })) }] : [];
    };
    return [...panel(`${label(method)}: speed-up`, speedup, geomean, "x"),
      ...panel(`${label(method)}: device time, 1 = the reported run's`, times, () => 1, " µs")];
  },
};

update();
dark.addEventListener("change", draw);
let width = innerWidth, waiting = 0;
addEventListener("resize", () => {
  if (innerWidth === width) return; // a phone's address bar changes the height at every scroll
  width = innerWidth;
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(draw);
});
