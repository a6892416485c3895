"use strict";
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const tiles = [...document.querySelectorAll(".tile")];
  const get = (id) => document.getElementById(id);
  const viewer = get("viewer");
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let current = -1;

  const at = (tile) => {
    const [run, batch, file] = tile.dataset.at.split(".").map(Number);
    return { run: runs[run], batch: runs[run].batches[batch], file: runs[run].batches[batch].files[file], number: file };
  };

  // Everything below writes text with textContent: what a prompt says is never markup.
  const make = (tag, text, attributes = {}) => {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };

  const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));

  const bytes = (size) => {
    const units = ["B", "KB", "MB", "GB"];
    let unit = 0;
    for (; size >= 1000 && unit < 3; unit++) size /= 1000;
    return `${unit ? size.toFixed(size < 10 ? 1 : 0) : size} ${units[unit]}`;
  };

  const fact = (name, value) => {
    const row = document.createElement("div");
    row.append(make("dt", name), make("dd", value, { dir: "auto" }));
    get("facts").append(row);
    return row.lastChild;
  };

  const media = (file, href) => {
    if (file.kind === "image") return Object.assign(new Image(), { src: href, alt: file.path });
    if (file.kind === "video" || file.kind === "audio") {
      const player = Object.assign(document.createElement(file.kind), { src: href, controls: true, loop: true });
      player.autoplay = !still && file.kind === "video";
      player.muted = true;
      return player;
    }
    if (file.text) return make("pre", file.text, { dir: "auto", tabindex: "0" });
    return make("a", `Open ${file.path}`, { href });
  };

  const show = (index) => {
    if (index < 0 || index >= tiles.length) return;
    current = index;
    const href = tiles[index].getAttribute("href");
    const { run, batch, file, number } = at(tiles[index]);
    const element = media(file, href);
    get("stage").replaceChildren(element);
    get("viewer-title").textContent = file.path;
    get("position").textContent = `${index + 1} of ${tiles.length}`;
    get("previous").disabled = index === 0;
    get("next").disabled = index === tiles.length - 1;
    get("facts").replaceChildren();
    if (batch.row !== null) fact("Row", batch.row);
    fact("Batch", batch.files.length > 1 ? `${batch.index}, file ${number + 1} of ${batch.files.length}` : batch.index);
    if (batch.seed !== null) fact("Seed", batch.seed);
    for (const [name, value] of Object.entries({ ...run.variables, ...batch.variables })) fact(name, shown(value));
    if (file.node) fact("Node", file.node);
    const size = fact("Size", bytes(file.size));
    const measure = () => {
      const width = element.naturalWidth || element.videoWidth;
      if (width) size.textContent = `${width} × ${element.naturalHeight || element.videoHeight}, ${bytes(file.size)}`;
    };
    element.addEventListener("load", measure);
    element.addEventListener("loadedmetadata", measure);
    if (batch.seconds !== null) fact("Time", `${batch.seconds.toFixed(1)} s`);
    fact("Made", run.started);
    get("again").hidden = !batch.command;
    get("command").textContent = batch.command;
    const several = batch.files.length > 1 ? `It makes the whole batch; this is number ${number + 1}. ` : "";
    get("command-note").textContent = several + run.note;
    document.querySelector(".panel").scrollTop = 0;
    if (!viewer.open) viewer.showModal();
    // The neighbours, so that the next arrow shows its picture at once.
    for (const near of [index + 1, index - 1]) {
      if (tiles[near] && at(tiles[near]).file.kind === "image") new Image().src = tiles[near].getAttribute("href");
    }
  };

  const close = () => viewer.close();
  viewer.addEventListener("close", () => {
    get("stage").replaceChildren();
    tiles[current].focus();
    tiles[current].scrollIntoView({ block: "nearest" });
  });

  let timer = 0;
  const say = (text) => {
    // A modal dialog hides what is outside of it.
    (viewer.open ? viewer : document.body).append(get("said"));
    get("said").textContent = text;
    clearTimeout(timer);
    timer = setTimeout(() => { get("said").textContent = ""; }, 2500);
  };

  const copy = async (text) => {
    if (!text) return say("There is no command for this one");
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Browsers that keep the clipboard from pages of the disk.
      const area = make("textarea", text);
      (viewer.open ? viewer : document.body).append(area);
      area.select();
      const copied = document.execCommand("copy");
      area.remove();
      if (!copied) return say("The browser does not let this page copy: select the command");
    }
    say("Command copied");
  };

  // The nearest tile of the row above or below, across sections of different lengths.
  const vertical = (from, step) => {
    const here = tiles[from].getBoundingClientRect();
    const away = (index) => Math.abs(tiles[index].getBoundingClientRect().left - here.left);
    let best = from;
    let top = null;
    for (let index = from + step; tiles[index]; index += step) {
      const there = tiles[index].getBoundingClientRect().top;
      if (Math.abs(there - here.top) < 2) continue;
      if (top !== null && Math.abs(there - top) >= 2) break;
      if (top === null || away(index) < away(best)) best = index;
      top = there;
    }
    return best;
  };

  const move = (from, key) => {
    if (key === "Home") return 0;
    if (key === "End") return tiles.length - 1;
    if (key === "ArrowLeft") return from - 1;
    if (key === "ArrowRight") return from + 1;
    if (key === "ArrowUp") return vertical(from, -1);
    if (key === "ArrowDown") return vertical(from, 1);
    return null;
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest && event.target.closest("video, audio")) return;
    const focused = tiles.indexOf(document.activeElement);
    const here = viewer.open ? current : focused;
    if (event.key === "c" && here >= 0) {
      event.preventDefault();
      copy(at(tiles[here]).batch.command);
      return;
    }
    if (viewer.open && (event.key === "ArrowUp" || event.key === "ArrowDown")) return; // scrolls
    const next = here < 0 ? (event.key.startsWith("Arrow") ? 0 : null) : move(here, event.key);
    if (next === null || next < 0 || next >= tiles.length) return;
    event.preventDefault();
    if (viewer.open) show(next);
    else tiles[next].focus();
  });

  document.querySelector("main").addEventListener("click", (event) => {
    const button = event.target.closest(".copy");
    if (button) copy(button.dataset.command);
    const tile = event.target.closest(".tile");
    // With Ctrl and the like a link opens in a tab of its own, as anywhere.
    if (!tile || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(tiles.indexOf(tile));
  });
  get("previous").addEventListener("click", () => show(current - 1));
  get("next").addEventListener("click", () => show(current + 1));
  get("close").addEventListener("click", close);
  get("copy").addEventListener("click", () => copy(get("command").textContent));

  // A swipe is an arrow on a phone.
  let touch = null;
  get("stage").addEventListener("touchstart", (event) => { touch = event.touches.length === 1 ? event.touches[0] : null; }, { passive: true });
  get("stage").addEventListener("touchend", (event) => {
    if (!touch) return;
    const dx = event.changedTouches[0].clientX - touch.clientX;
    const dy = event.changedTouches[0].clientY - touch.clientY;
    if (Math.abs(dx) > 50 && Math.abs(dx) > 2 * Math.abs(dy)) show(current + (dx < 0 ? 1 : -1));
    touch = null;
  }, { passive: true });

  // The tiles take the shape of the first picture.
  const first = document.querySelector(".tile img");
  const shape = () => {
    if (first.naturalWidth) document.documentElement.style.setProperty("--ratio", first.naturalWidth / first.naturalHeight);
  };
  if (first) first.complete ? shape() : first.addEventListener("load", shape, { once: true });

  // A video's first frame is its thumbnail, fetched when it comes near the screen.
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      entry.target.preload = "metadata";
      near.unobserve(entry.target);
    }
  }, { rootMargin: "50%" });
  for (const video of document.querySelectorAll(".tile video")) near.observe(video);
})();
