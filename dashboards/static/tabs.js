/** Tabs by the book: one stop for the tab key, arrows between them, panels made when first shown. */
import { at, h } from "./dom.js";
import { setView, view } from "./view.js";
import { typing } from "./shell.js";

/**
 * @param {Array<{name: string, label: string, build: (panel: HTMLElement) => void, shown?: () => void}>} tabs
 */
export function makeTabs(tabs) {
  const list = at("tabs");
  const panels = at("panels");
  const made = new Map();
  const show = (name, focus = false) => {
    for (const tab of tabs) {
      const on = tab.name === name;
      const button = at(`tab-${tab.name}`);
      button.setAttribute("aria-selected", String(on));
      button.tabIndex = on ? 0 : -1;
      at(`panel-${tab.name}`).hidden = !on;
      if (!on) continue;
      if (focus) button.focus();
      if (!made.has(name)) {
        made.set(name, true);
        tab.build(at(`panel-${name}`));
      }
      tab.shown?.();
    }
    setView({ tab: name === tabs[0].name ? null : name });
  };
  for (const [i, tab] of tabs.entries()) {
    list.append(h("button", {
      type: "button", role: "tab", id: `tab-${tab.name}`, "aria-controls": `panel-${tab.name}`, onclick: () => show(tab.name),
      onkeydown: (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1, Home: -i, End: tabs.length - 1 - i }[event.key];
        if (step === undefined) return;
        event.preventDefault();
        show(tabs[(i + step + tabs.length) % tabs.length].name, true);
      },
    }, tab.label));
    panels.append(h("section", { role: "tabpanel", id: `panel-${tab.name}`, "aria-labelledby": `tab-${tab.name}`, class: "panel", hidden: true, tabindex: "0" }));
  }
  document.addEventListener("keydown", (event) => {
    const tab = tabs[Number(event.key) - 1];
    if (tab && !typing(event)) show(tab.name);
  });
  show(tabs.some((tab) => tab.name === view("tab")) ? view("tab") : tabs[0].name);
  return { show, made: (name) => made.has(name) };
}
