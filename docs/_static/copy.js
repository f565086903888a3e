// A button on each block of code that copies it.
document.addEventListener("DOMContentLoaded", () => {
  for (const block of document.querySelectorAll("div.highlight")) {
    const code = block.querySelector("pre");
    if (!code || block.closest(".cell_output")) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "copy";
    button.setAttribute("aria-label", "copy this code");
    button.addEventListener("click", async () => {
      let text = code.textContent;
      if (/^>>> /m.test(text)) { // a session: its statements, without prompts and results
        const lines = text.split("\n").filter((line) => /^(>>>|\.\.\.)( |$)/.test(line));
        text = lines.map((line) => line.slice(4)).join("\n");
      }
      try {
        await navigator.clipboard.writeText(text.trimEnd());
        button.textContent = "copied";
      } catch {
        button.textContent = "press Ctrl+C";
        getSelection().selectAllChildren(code);
      }
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
    block.append(button);
  }
});
