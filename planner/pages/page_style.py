"""The one style sheet of our HTML pages: system fonts, light and dark by the reader's preference, fit to print."""

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1d2430; --soft: #5c6675; --line: #d8dde5; --page: #ffffff; --card: #f6f8fb;
  --bad: #c2272d; --warn: #9a6200; --note: #2f62b5; --good: #1c7a45;
  --hue0: #bcd5f2; --hue1: #c3e3d0; --hue2: #f3dcb1; --hue3: #dccdf0; --hue4: #f2c9c9; --hue5: #cfe2e6;
  --weights: #7fa8d8; --kv_cache: #6fb98c; --activations: #e0b352; --logits: #b58ad0; --buffers: #8a9bb0;
  --workspace: #b9c1cc; --context: #ccd3dc; --reserve: #dfe4ea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6eaf0; --soft: #9aa5b5; --line: #333c49; --page: #14181f; --card: #1c222b;
    --bad: #ff7a78; --warn: #efb44d; --note: #86b1f5; --good: #6fcf97;
    --hue0: #2d4a6d; --hue1: #2b5340; --hue2: #5e4a22; --hue3: #493a63; --hue4: #613636; --hue5: #2f4d55;
    --weights: #4d7db5; --kv_cache: #3f8d62; --activations: #a98230; --logits: #825ca0; --buffers: #5c6d82;
    --workspace: #4a5360; --context: #3d4551; --reserve: #323a45;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 56px; }
h1 { font-size: 22px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 34px 0 10px; }
p { margin: 4px 0; } .soft { color: var(--soft); }
code, pre, .mono { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
.verdict { display: inline-block; margin: 8px 0 2px; padding: 3px 12px; border-radius: 99px; font-weight: 600;
  border: 1px solid currentColor; }
.will-fail { color: var(--bad); } .may-fail { color: var(--warn); } .wasteful { color: var(--note); }
.clean { color: var(--good); }
figure { margin: 14px 0 0; overflow-x: auto; } figcaption { color: var(--soft); font-size: 13px; margin-top: 8px; }
.picture { width: 100%; height: auto; display: block; }
.picture text { fill: var(--ink); font: 11px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.picture .device { font: 600 15px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
.picture .amount { fill: var(--soft); font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
.picture .amount.bad { fill: var(--bad); font-weight: 600; }
.picture .free { fill: var(--soft); text-anchor: middle; }
.picture .carried { fill: var(--soft); text-anchor: middle; paint-order: stroke; stroke: var(--page);
  stroke-width: 5px; stroke-linejoin: round; }
.frame { fill: var(--card); stroke: var(--line); } .element { stroke: var(--page); stroke-opacity: .55; }
.limit { stroke: var(--bad); stroke-width: 2; stroke-dasharray: 5 3; }
.failed { fill: url(#hatch); stroke: var(--bad); stroke-width: 2; } .hatch { fill: var(--bad); fill-opacity: .45; }
.flow { fill: none; stroke: var(--soft); marker-end: url(#tip); } .tip { fill: var(--soft); }
.hue0 { fill: var(--hue0); } .hue1 { fill: var(--hue1); } .hue2 { fill: var(--hue2); }
.hue3 { fill: var(--hue3); } .hue4 { fill: var(--hue4); } .hue5 { fill: var(--hue5); }
.weights { fill: var(--weights); background: var(--weights); }
.kv_cache { fill: var(--kv_cache); background: var(--kv_cache); }
.activations { fill: var(--activations); background: var(--activations); }
.logits { fill: var(--logits); background: var(--logits); }
.buffers { fill: var(--buffers); background: var(--buffers); }
.workspace { fill: var(--workspace); background: var(--workspace); }
.context { fill: var(--context); background: var(--context); }
.reserve { fill: var(--reserve); background: var(--reserve); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 10px 0 0; padding: 0; list-style: none;
  font-size: 13px; }
.legend i { display: inline-block; width: 11px; height: 11px; margin-right: 6px; border-radius: 2px; }
.finding { margin: 10px 0; padding: 10px 14px; background: var(--card); border-left: 4px solid currentColor;
  border-radius: 4px; break-inside: avoid; }
.finding > * { color: var(--ink); } .finding h3 { margin: 0; font-size: 15px; overflow-wrap: anywhere; }
.finding .tag { font-size: 12px; font-weight: 600; text-transform: uppercase; letter-spacing: .04em; color: inherit; }
.finding ul { margin: 4px 0; padding-left: 20px; } .finding li { overflow-wrap: anywhere; font-size: 13.5px; }
.finding .mono { display: block; overflow-wrap: anywhere; color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 18px 4px 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
.wide { overflow-x: auto; margin: 10px 0; } .beside { display: flex; flex-wrap: wrap; gap: 0 56px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: 10px 14px;
  overflow-x: auto; }
pre .add { color: var(--good); } pre .del { color: var(--bad); } pre .at { color: var(--note); }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--soft); }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
@media print {
  :root { --page: #fff; --card: #f6f8fb; --ink: #000; --soft: #444; --line: #bbb; }
  main { max-width: none; padding: 0; } details { display: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
"""Plain CSS, inlined into each page; classes are those of planner/picture.py and planner/html_report.py."""
