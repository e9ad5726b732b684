"use strict";
// Light or dark: the system's wish until the reader says otherwise; remembered where the browser allows it for a file.
const root = document.documentElement;
const button = document.getElementById("theme");
const system = window.matchMedia("(prefers-color-scheme: dark)");
const recall = () => { try { return localStorage.getItem("fedtrust-theme"); } catch { return null; } };
const keep = (theme) => { try { localStorage.setItem("fedtrust-theme", theme); } catch { /* private window */ } };
const now = () => root.dataset.theme || (system.matches ? "dark" : "light");
const name = () => { button.textContent = now() === "dark" ? "Light" : "Dark"; };
const remembered = recall();
if (remembered === "light" || remembered === "dark") root.dataset.theme = remembered;
button.hidden = false;
button.addEventListener("click", () => {
  root.dataset.theme = now() === "dark" ? "light" : "dark";
  keep(root.dataset.theme);
  name();
});
system.addEventListener("change", name);
name();
// Paper cannot unfold anything.
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((part) => { part.open = true; });
});
window.addEventListener("afterprint", () => folded.forEach((part) => { part.open = false; }));
