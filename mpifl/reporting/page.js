// Says what is under the pointer on a chart, and opens what is folded before the page is printed.
"use strict";
const box = document.getElementById("read-out");

function number(value, digits) {
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits });
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return x - xs[low] <= xs[high] - x ? low : high;
}

for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const { axes, frame, lines } = JSON.parse(svg.dataset.chart);
  const [first, last, left, right, top, bottom] = frame;
  const view = svg.viewBox.baseVal;
  const cursor = document.createElementNS(svg.namespaceURI, "path");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);

  svg.addEventListener("pointermove", (event) => {
    const shown = svg.getBoundingClientRect();
    const pixel = (event.clientX - shown.left) * (view.width / shown.width);
    const share = Math.min(1, Math.max(0, (pixel - left) / (view.width - left - right)));
    const x = first + share * (last - first);
    const found = lines.map(([label, tone, xs, ys]) => ({ label, tone, at: nearest(xs, x), xs, ys }));
    // All lines are read where the nearest point of any is; one that ends before is left out.
    const at = found.map((line) => line.xs[line.at]).reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
    const place = left + ((at - first) / (last - first)) * (view.width - left - right);
    cursor.setAttribute("d", `M${place} ${top}V${view.height - bottom}`);
    box.replaceChildren(Object.assign(document.createElement("b"), { textContent: `${axes[0]} ${number(at, 6)}` }));
    for (const { label, tone, xs, ys } of found) {
      if (at < xs[0] || at > xs[xs.length - 1]) continue;
      const row = document.createElement("div"), dot = document.createElement("i");
      dot.className = `b${tone}`;
      row.append(dot, `${label}: ${number(ys[nearest(xs, at)], 4)}`);
      box.append(row);
    }
    box.style.display = "block";
    const beyond = event.clientX + 16 + box.offsetWidth > innerWidth;
    box.style.left = `${Math.max(4, beyond ? event.clientX - 16 - box.offsetWidth : event.clientX + 16)}px`;
    box.style.top = `${Math.min(event.clientY + 12, innerHeight - box.offsetHeight - 4)}px`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.removeAttribute("d");
    box.style.display = "none";
  });
}

addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
