(() => {
  const root = document.documentElement;
  const button = document.querySelector(".theme");
  const themes = ["auto", "light", "dark"];
  const kept = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const show = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = "Theme: " + theme;
    try { localStorage.setItem("theme", theme); } catch { /* a page from a file may keep nothing */ }
  };
  let theme = themes.includes(kept()) ? kept() : "auto";
  show(theme);
  button.hidden = false;
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    show(theme);
  });

  for (const head of document.querySelectorAll("table.sortable thead th")) {
    const label = head.innerHTML;
    const press = document.createElement("button");
    press.type = "button";
    press.innerHTML = label;
    head.replaceChildren(press);
    press.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = head.closest("table").tBodies[0];
      const value = (row) => row.children[head.cellIndex].dataset.v ?? row.children[head.cellIndex].textContent;
      const order = (a, b) => {
        const [x, y] = [value(a), value(b)];
        const [m, n] = [Number(x), Number(y)];
        if (Number.isNaN(m) !== Number.isNaN(n)) return Number.isNaN(m) ? 1 : -1;
        return (Number.isNaN(m) ? x.localeCompare(y) : m - n) * (down ? -1 : 1);
      };
      body.replaceChildren(...[...body.rows].sort(order));
    });
  }

  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
  if ("IntersectionObserver" in window) {
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        for (const link of links.values()) link.removeAttribute("aria-current");
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    }, { rootMargin: "-10% 0px -80% 0px" });
    for (const section of document.querySelectorAll("main section[id]")) seen.observe(section);
  }
  addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
})();
