// What this is, under which licences, and what is stored where.

import { call } from "./api.js";
import { $, table } from "./dom.js";
import { state } from "./state.js";

export function startAbout(isTokenNeeded) {
  const { info } = state;
  $("licences").replaceChildren(table(["what", "terms"], info.licences.map(({ what, terms }) => [what, terms])));
  $("stored").replaceChildren(table(["where", "what"], info.stored.map(({ where, what }) => [where, what])));
  const versions = Object.entries(info.versions ?? {}).map(([name, version]) => `${name} ${version}`);
  $("versions").replaceChildren(table(null, [
    ["Model", `${info.model}${info.revision ? ` (${info.revision})` : ""}`],
    ["Runs on", info.devices.join(", ")],
    ["idea_jax", info.version],
    ["With", versions.join(", ")],
    ["Keeps", `${info.limits.kept_pictures} pictures at most; beyond that the oldest go`],
  ]));
  $("leave-row").hidden = !isTokenNeeded;
  $("leave").addEventListener("click", async () => {
    await call("DELETE", "/v1/session").catch(() => {});
    location.reload();
  });
}
