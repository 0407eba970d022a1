/* Colours before the first paint: as stored, else as the system says. A classic script, so that it runs in time. */
"use strict";
{
  let stored = null;
  try {
    stored = localStorage.getItem("theme");
  } catch {
    // No storage here: the system decides.
  }
  if (stored === "light" || stored === "dark") document.documentElement.dataset.theme = stored;
}
