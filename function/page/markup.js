// Text of the model → nodes. Everything becomes text nodes: nothing that it writes is ever read as HTML.

/** Code fences, `code` and **bold**; the rest stays as it is. */
function markup(text) {
  const nodes = new DocumentFragment();
  text.split(/^ {0,3}```[^\n]*(?:\n|$)/m).forEach((part, index) => {
    if (index % 2) {
      nodes.append(element("pre", element("code", part.replace(/\n$/, ""))));
    } else if (part.trim()) {
      nodes.append(element("div", ...inline(part.replace(/^\n+|\s+$/g, ""))));
    }
  });
  return nodes;
}

function inline(text) {
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((part, index) => {
    if (index % 2 === 0) return part;
    return part.startsWith("`") ? element("code", part.slice(1, -1)) : element("strong", part.slice(2, -2));
  });
}

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}
