/** Plotly, loaded once, under a policy that allows neither inline styles nor evaluated code. */

let loading = null;

/** Plotly's library, when it is there. Raises where its file does not load. */
export function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = document.body.dataset.plotly;
    const settle = (call) => () => {
      delete document.createElement;
      call();
    };
    script.onload = settle(() => resolve(window.Plotly));
    script.onerror = settle(() => reject(new Error("the plotting library did not load; reload the page")));
    styleThroughObjectModel();
    // While it loads, it adds the style sheet of its maps, which no page here has: to an element that does nothing.
    document.createElement = (tag, ...rest) => Document.prototype.createElement.call(document, tag === "style" ? "template" : tag, ...rest);
    document.head.append(script);
  });
  return loading;
}

/* Plotly sets `style` attributes, which the policy forbids; the same declarations are allowed as properties. */
function styleThroughObjectModel() {
  const { setAttribute } = SVGElement.prototype;
  for (const kind of [SVGElement, HTMLElement]) {
    kind.prototype.setAttribute = function set(name, value) {
      if (name === "style") this.style.cssText = value;
      else setAttribute.call(this, name, value);
    };
  }
}

/** Whether the page is dark now. */
export function dark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

let probe = null;

/** A colour of the style sheet, as Plotly reads it. */
export function colour(name) {
  if (!probe) {
    probe = document.createElement("i");
    probe.hidden = true;
    document.body.append(probe);
  }
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

let templates = null;

/** A layout with what the page's colours decide of it: the figures' own template, on the page's ground. */
export function themed(layout) {
  templates ??= JSON.parse(document.getElementById("templates")?.textContent ?? "{}");
  const merged = {
    ...layout,
    template: templates[dark() ? "dark" : "light"],
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    autosize: true,
    font: { ...layout.font, color: colour("ink-2"), size: 12 },
    hoverlabel: { bgcolor: colour("surface-2"), bordercolor: colour("line-2"), font: { color: colour("ink"), size: 12 } },
  };
  delete merged.title;
  delete merged.width;
  delete merged.height;
  return merged;
}

export const CONFIG = { displayModeBar: false, displaylogo: false, responsive: true, showTips: false, doubleClick: "reset" };

/** A file for whoever looks, from text or a data address. */
export function download(name, content, type = "text/plain") {
  const link = document.createElement("a");
  const made = content.startsWith?.("data:") ? null : URL.createObjectURL(new Blob([content], { type }));
  link.href = made ?? content;
  link.download = name;
  link.click();
  if (made) setTimeout(() => URL.revokeObjectURL(made), 1000);
}
