"""The style sheet of the report: light or dark as the reader's system, from a phone to paper."""

# Colours are those of evaluation/drawing.py (Okabe and Ito): blue is right and orange is wrong.
CSS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1d21;--soft:#5c636e;--rule:#e4e6ea;--panel:#f6f7f9;--link:#00609a;
--right:#56b4e9;--wrong:#e69f00;--train:#0072b2;--validation:#009e73;--test:#d55e00;--rate:#666d78;--second:#d55e00}
@media (prefers-color-scheme:dark){:root{--paper:#131519;--ink:#e7e9ec;--soft:#9aa2ae;--rule:#2a2e36;--panel:#1b1e24;
--link:#7cc4f2;--train:#56b4e9;--validation:#2fbf94;--test:#f2894a;--rate:#9aa2ae;--second:#f2894a}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:1120px;padding:40px 24px 64px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans',sans-serif;overflow-wrap:anywhere}
h1{font-size:30px;line-height:1.2;font-weight:650;letter-spacing:-.01em;margin:2px 0 6px}
h2{font-size:19px;line-height:1.3;font-weight:650;margin:0 0 4px}
h3{font-size:15px;font-weight:650;margin:24px 0 4px}
p{margin:0 0 10px;max-width:76ch}
a{color:var(--link);text-underline-offset:3px;text-decoration-thickness:1px}
section{margin-top:52px}
.kicker,.lede,.soft,caption,figcaption,.legend,footer{color:var(--soft)}
.kicker{font-size:13px;margin:0}
.lede{font-size:16px}
.note{border-left:3px solid var(--wrong);padding:6px 14px;background:var(--panel);max-width:none}
nav{margin-top:22px;padding-bottom:12px;border-bottom:1px solid var(--rule);font-size:14px}
nav a{display:inline-block;margin:0 18px 4px 0;text-decoration:none}
nav a:hover{text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:1px;margin:24px 0 0;
border:1px solid var(--rule);border-radius:8px;overflow:hidden}
.tiles div{box-shadow:0 0 0 1px var(--rule);padding:12px 16px 13px;display:flex;flex-direction:column}
.tiles dt{font-size:13px;color:var(--soft)}
.tiles dd{margin:0}
.tiles b{font-size:24px;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}
.tiles small{display:block;font-size:13px;color:var(--soft)}
.facts{display:grid;grid-template-columns:minmax(90px,max-content) 1fr;gap:5px 22px;margin:10px 0 0}
.facts dt{color:var(--soft)}
.facts dd{margin:0;max-width:80ch}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(290px,1fr));gap:22px 28px;margin-top:14px}
.charts svg{width:100%;height:auto;max-width:560px;font-size:11px;font-variant-numeric:tabular-nums;overflow:visible}
.charts text{fill:var(--soft)}
.charts .title{fill:var(--ink);font-size:12.5px;font-weight:600}
.charts .y{text-anchor:end;dominant-baseline:central}
.charts .x{text-anchor:middle}
.grid{stroke:var(--rule);stroke-width:1}
.line{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
circle{fill:var(--c);stroke:var(--paper);stroke-width:.8}
.train{--c:var(--train)}.validation{--c:var(--validation)}.test{--c:var(--test)}.rate{--c:var(--rate)}
.line.test{stroke-dasharray:5 3}
.legend{margin-top:8px;font-size:13px}
.legend span{margin-right:20px;white-space:nowrap}
.legend svg{width:28px;height:8px;margin-right:7px}
.wide{overflow-x:auto;margin-top:10px}
.tables{display:flex;flex-wrap:wrap;align-items:flex-start;gap:14px 64px}
.tables .wide{max-width:100%}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums lining-nums}
caption{text-align:left;font-size:13px;padding-bottom:6px}
thead th{color:var(--soft);font-weight:500;font-size:13px;vertical-align:bottom}
th{font-weight:400;text-align:left}
th,td{padding:4px 22px 4px 0;border-bottom:1px solid var(--rule);white-space:nowrap}
th:last-child,td:last-child{padding-right:2px}
th bdi{display:inline-block;max-width:34ch;overflow:hidden;text-overflow:ellipsis;vertical-align:bottom}
.n{text-align:right}
tbody th{position:sticky;left:0;background:var(--paper)}
#recipe td:last-child{white-space:normal;min-width:26ch}
tbody tr:hover>*{background:var(--panel)}
tr.sum>*{font-weight:600;border-bottom:0}
.bar{display:inline-block;width:64px;height:6px;margin-left:9px;border-radius:3px;vertical-align:middle;
background:linear-gradient(var(--right),var(--right)) 0 0/calc(var(--s)*100%) 100% no-repeat var(--rule)}
.matrix{border-collapse:separate;border-spacing:2px;margin-top:4px}
.matrix th,.matrix td{border:0;padding:0}
.matrix tbody tr:hover>:not(.c){background:none}
.matrix thead th{padding:0 0 5px;text-align:center}
.matrix thead th.turned{height:1px;text-align:left}
.matrix thead th.turned span{writing-mode:vertical-rl;transform:rotate(180deg);display:inline-block;max-height:170px;
overflow:hidden;text-overflow:ellipsis;vertical-align:bottom;line-height:42px}
.matrix thead th.corner{text-align:right;padding:0 10px 6px 0;line-height:1.35}
.matrix tbody th{padding-right:10px;text-align:right}
.matrix td.c{width:42px;min-width:34px;height:34px;text-align:center;border-radius:4px;background:var(--panel)}
.matrix td.r{background:color-mix(in srgb,var(--right) calc(8% + var(--s)*47%),var(--paper))}
.matrix td.w{background:color-mix(in srgb,var(--wrong) calc(12% + var(--s)*43%),var(--paper))}
.matrix td.n{padding-left:12px;color:var(--soft)}
.matrix button{all:unset;display:block;width:100%;height:34px;line-height:34px;cursor:pointer;border-radius:4px;
text-align:center}
.matrix button:hover{box-shadow:inset 0 0 0 1.5px var(--ink)}
:focus-visible,.matrix button:focus-visible{outline:2px solid var(--link);outline-offset:1px}
[popover]{border:1px solid var(--rule);border-radius:12px;padding:0;width:min(860px,calc(100vw - 24px));
max-height:min(720px,calc(100vh - 48px));background:var(--paper);color:var(--ink);box-shadow:0 12px 48px #0004;
overflow:auto;overscroll-behavior:contain}
[popover]::backdrop{background:#0006}
.bar-top{position:sticky;top:0;display:flex;gap:16px;justify-content:space-between;align-items:flex-start;
padding:16px 20px 10px;background:var(--paper);border-bottom:1px solid var(--rule)}
.bar-top h3,.bar-top p{margin:0}
.bar-top p{font-size:13px;color:var(--soft)}
.close{font:inherit;font-size:14px;color:var(--ink);background:var(--panel);border:1px solid var(--rule);
border-radius:7px;padding:4px 13px;cursor:pointer}
[popover] .gallery{padding:4px 20px 22px}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(112px,1fr));gap:20px 16px;margin-top:16px}
.gallery.pairs{grid-template-columns:repeat(auto-fill,minmax(240px,1fr))}
.gallery.threes{grid-template-columns:repeat(auto-fill,minmax(328px,1fr))}
figure{margin:0;break-inside:avoid}
figure div{display:flex;gap:6px;align-items:flex-start}
.gallery img{width:100%;max-width:112px;height:auto;aspect-ratio:1;object-fit:contain;border-radius:4px;
background:var(--panel)}
.pairs img,.threes img{flex:1 1 0;min-width:0;max-width:176px}
.px{image-rendering:pixelated}
figcaption{font-size:13px;line-height:1.4;margin-top:5px}
figcaption b{font-weight:600;color:var(--ink)}
figcaption .file{display:block;font-size:12px;opacity:.85}
.key{color:var(--soft);max-width:none}
.key i{display:inline-block;width:10px;height:10px;border-radius:3px;margin:0 4px 0 8px;vertical-align:-1px}
details{margin-top:14px}
summary{cursor:pointer;color:var(--link);width:max-content;max-width:100%}
footer{margin-top:60px;padding-top:14px;border-top:1px solid var(--rule);font-size:13px}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media (max-width:560px){body{padding:24px 16px 48px;font-size:15px}h1{font-size:25px}section{margin-top:42px}
.tiles{grid-template-columns:1fr 1fr}.tiles div{padding:10px 13px}.tiles b{font-size:20px}
th bdi{max-width:20ch}.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:9px}
.gallery{grid-template-columns:repeat(auto-fill,minmax(96px,1fr));gap:18px 12px}
.gallery.pairs,.gallery.threes{grid-template-columns:1fr}}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#444;--rule:#ccc;--panel:#f4f4f4;--link:#000;
--train:#0072b2;--validation:#009e73;--test:#d55e00;--rate:#666d78}
body{max-width:none;padding:0;font-size:10pt;print-color-adjust:exact;-webkit-print-color-adjust:exact}
nav,[popover]{display:none}section{margin-top:26pt}h2{break-after:avoid}tr,svg{break-inside:avoid}
.tiles{grid-template-columns:repeat(5,1fr)}.tiles div{padding:7pt 8pt}.tiles b{font-size:14pt}
.charts{grid-template-columns:repeat(3,1fr);gap:14pt}.wide{overflow:visible}table{font-size:8pt}
th,td{padding:2pt 8pt 2pt 0}thead th,caption,.tiles small,figcaption{font-size:8pt}
code,figcaption .file{font-size:7.5pt}
.gallery{grid-template-columns:repeat(6,1fr)}.gallery.pairs{grid-template-columns:repeat(3,1fr)}
.gallery.threes{grid-template-columns:repeat(2,1fr)}}
""".strip()
