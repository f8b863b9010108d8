"""The style sheet of the page: that of the report for our parts of Gradio's page, and what only the page has."""

from googlenet_jax.page import style

# Rules inside `.ours` reach our parts only. Gradio's page and the report are dark where the reader's system is.
CSS = (
  '.ours{'
  + style.CSS.replace(':root{', '&{')
  + """
color:var(--ink);overflow-wrap:anywhere;font-size:15px;line-height:1.5;
section{margin-top:28px}
.answer{margin-top:0;scroll-margin-top:16px}
.best{font-size:26px;line-height:1.25;font-weight:650;margin:0}
.truth b{color:var(--link)}
.classes{border:0;padding:0;margin:12px 0 18px;min-width:0}
legend{font-size:13px;color:var(--soft);padding:0;margin-bottom:4px}
.said{display:grid;grid-template-columns:auto minmax(0,1fr) auto;gap:3px 9px;align-items:center;padding:5px 8px 7px;
margin:0 -8px;border-radius:7px}
label.said{cursor:pointer}
div.said{grid-template-columns:minmax(0,1fr) auto}
.said:has(:checked),label.said:hover{background:var(--panel)}
.said:has(:focus-visible){outline:2px solid var(--link)}
.said input{appearance:auto;width:15px;height:15px;margin:0;background:none;border:0;box-shadow:none;
accent-color:var(--link)}
.share{font-variant-numeric:tabular-nums}
.track{grid-column:1/-1;height:7px;border-radius:4px;
background:linear-gradient(var(--right),var(--right)) 0 0/calc(var(--s)*100%) 100% no-repeat var(--rule)}
.views{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(200px,100%),1fr));gap:16px;margin-bottom:10px;
max-width:640px}
.views img{width:100%;max-height:300px;object-fit:contain;object-position:left top;background:none}
.legend svg{display:inline-block}
.map{display:none}
.answer:has(.k0 :checked) .map.k0,.answer:has(.k1 :checked) .map.k1,.answer:has(.k2 :checked) .map.k2,
.answer:has(.k3 :checked) .map.k3,.answer:has(.k4 :checked) .map.k4{display:block}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(66px,1fr));gap:8px;margin-top:8px}
.grid button{all:unset;cursor:pointer;border-radius:6px;display:block}
.grid button:hover,.grid button:focus-visible{outline:2px solid var(--link);outline-offset:1px}
.grid img{display:block;width:100%;aspect-ratio:1;object-fit:cover}
.trouble{border-left:3px solid var(--wrong);padding:8px 14px;background:var(--panel)}
}
"""
)
