"""Style and script of the status page, and the policy that allows a browser only these two."""

from __future__ import annotations

import base64
import hashlib

STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1c2024;--soft:#60646c;--line:#d9d9e0;
  --good:#18794e;--bad:#b4232c;--mark:#0d74ce;--two:#b35c00}
@media(prefers-color-scheme:dark){:root{--back:#111113;--text:#edeef0;--soft:#b0b4ba;
  --line:#363a3f;--good:#3dd68c;--bad:#ff9592;--mark:#70b8ff;--two:#ffa057}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;background:var(--back);color:var(--text);
  font:16px/1.45 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}
.good{color:var(--good)}.bad{color:var(--bad)}small,.soft{color:var(--soft)}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.3rem .7rem .3rem 0;border-bottom:1px solid var(--line);
  white-space:nowrap}
td.name{white-space:normal;overflow-wrap:anywhere;min-width:9rem}td.n,th.n{text-align:right}
ul{padding-left:1.2rem;margin:.3rem 0}li{overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.6rem;margin:.8rem 0}
dt{color:var(--soft);font-size:.85rem}dd{margin:0;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:1rem;
  align-items:end}
figure{margin:0}figcaption{font-size:.9rem}
svg{width:100%;height:5.6rem;display:block}polyline{fill:none;stroke:var(--mark);
  stroke-width:1.5;vector-effect:non-scaling-stroke}
polyline.s1{stroke:var(--two)}line{stroke:var(--line)}
form{display:flex;flex-wrap:wrap;gap:.5rem}
input,button{font:inherit;padding:.35rem .5rem;color:inherit;background:transparent;
  border:1px solid var(--line);border-radius:.3rem}
input{min-width:0;max-width:100%}
button{border-color:var(--mark);cursor:pointer}
"""

SCRIPT = """
const live=document.getElementById("live"),lost=document.getElementById("lost");
setInterval(async()=>{
  if(document.hidden)return;
  try{
    const answer=await fetch("/live");
    if(answer.ok)live.innerHTML=await answer.text();
    lost.hidden=answer.ok
  }catch{lost.hidden=false}
},3000);
"""


def source_hash(text: str) -> str:
    """Hash by which a content security policy names an inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


SECURITY_POLICY = (
    f"default-src 'none'; style-src {source_hash(STYLE)}; script-src {source_hash(SCRIPT)}; "
    "connect-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
