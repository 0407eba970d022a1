/** Plain data as YAML: what a spec is made of, no more. */

/** Plain data as YAML, without what is empty. */
export function yaml(value, indent = "") {
  const plain = (leaf) => (typeof leaf === "string" ? (/^[\w./*-][\w./* -]*$/.test(leaf) && !/^(true|false|null|~|[\d.+-].*)$/i.test(leaf) ? leaf : JSON.stringify(leaf)) : String(leaf));
  const void_ = (each) => each === null || (typeof each === "object" && Object.keys(each).length === 0);
  return Object.entries(value).filter(([, each]) => !void_(each)).map(([key, each]) => {
    if (Array.isArray(each)) {
      if (each.every((leaf) => typeof leaf !== "object")) return `${indent}${key}: [${each.map(plain).join(", ")}]`;
      return `${indent}${key}:\n${each.map((item) => `${indent}  - ${yaml(item, `${indent}    `).trimStart()}`).join("\n")}`;
    }
    if (typeof each === "object") return `${indent}${key}:\n${yaml(each, `${indent}  `)}`;
    return `${indent}${key}: ${plain(each)}`;
  }).join("\n");
}
