() => {
  const editing = (node) => node && (node.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(node.tagName));
  const votes = { 1: "vote-a", 2: "vote-b", 0: "vote-tie", 9: "vote-both-bad", n: "vote-next" };
  const steps = { ArrowRight: 1, ArrowLeft: -1 };

  // Keys of the blind vote, only while its tab is open and nobody is typing.
  const vote = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || editing(event.target)) return;
    const button = document.getElementById(votes[event.key]);
    if (button && button.offsetParent !== null && !button.disabled) {
      event.preventDefault();
      button.click();
    }
  };

  // Arrow keys walk from token to token inside a coloured answer.
  const walk = (event) => {
    const token = event.target.closest && event.target.closest(".tok");
    if (!token || !(event.key in steps)) return;
    const all = [...token.parentElement.querySelectorAll(".tok")];
    const next = all[all.indexOf(token) + steps[event.key]];
    if (next) {
      token.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      event.preventDefault();
    }
  };
  document.addEventListener("keydown", (event) => { walk(event); vote(event); });
}
