// What the page does by itself. Python makes the HTML and hears of the buttons pressed; here that
// HTML is drawn, only where it changed, so that folds stay open and nothing jumps.
"use strict";
window.fathom ??= (() => {
  // A second line behind the escaping in Python: what is not listed here never reaches the page.
  const TAGS = new Set(
    ("article aside b blockquote br button cite code dd details div dl dt em figcaption figure form" +
      " h2 h3 h4 i img input label li mark nav ol option p path pre progress section select span" +
      " strong sub summary sup svg table tbody td th thead tr ul line rect g text use defs clipPath" +
      " polyline polygon circle title desc").toLowerCase().split(" ")
  );
  const OWN = /^(\/|#|data:image\/png;base64,)/;

  const SIDES = ["left", "top", "width", "height"];  // in percent: data-left and so on

  const clean = (html) => {
    const template = document.createElement("template");
    template.innerHTML = html;
    for (const element of template.content.querySelectorAll("*")) {
      if (!TAGS.has(element.localName.toLowerCase())) element.remove();
      for (const { name, value } of [...element.attributes]) {
        const leads = /^(src|href|xlink:href|action|formaction)$/.test(name);
        const styled = name === "style" && !(element instanceof SVGElement);
        if (/^on/.test(name) || styled || (leads && !OWN.test(value))) element.removeAttribute(name);
      }
      for (const side of SIDES) {
        if (side in element.dataset) element.style[side] = `${Number(element.dataset[side])}%`;
      }
    }
    return template.content;
  };

  // Put `html` into `element`, unless it is there already.
  const put = (element, html) => {
    if (element.fathomHtml === html) return;
    element.fathomHtml = html;
    element.replaceChildren(clean(html));
  };

  const fit = (parent, count, make) => {
    while (parent.children.length > count) parent.lastElementChild.remove();
    while (parent.children.length < count) parent.append(make());
  };

  // Tell Python of a pressed [data-event] button: its data, and the fields of its form.
  const buttons = (element, trigger, events) => {
    const tell = (button) => {
      const form = button.closest("form");
      const fields = form ? Object.fromEntries(new FormData(form)) : {};
      if (events.includes(button.dataset.event)) {
        trigger(button.dataset.event, { ...fields, ...button.dataset });
      }
    };
    element.addEventListener("click", (event) => {
      const button = event.target.closest("button[data-event]");
      if (!button) return;
      event.preventDefault();
      tell(button);
    });
    element.addEventListener("submit", (event) => {
      event.preventDefault();
      const button = event.target.querySelector("button[data-event]");
      if (button) tell(button);
    });
  };

  // A component whose value is HTML.
  const show = (element, props, trigger, watch, events) => {
    const root = element.querySelector(".shown");
    const draw = () => put(root, props.value ?? "");
    buttons(element, trigger, events);
    watch("value", draw);
    draw();
  };

  // A component whose value is {busy, empty, turns: [{question, answers: [html]}]}.
  const conversation = (element, props, trigger, watch, events) => {
    const log = element.querySelector(".log");
    const newTurn = () => {
      const turn = document.createElement("article");
      turn.className = "turn";
      turn.innerHTML = '<h2 class="question"></h2><div class="answers"></div>';
      return turn;
    };
    const newCard = () => {
      const card = document.createElement("section");
      card.className = "card";
      return card;
    };
    const draw = () => {
      const { turns = [], busy = false, empty = "" } = props.value || {};
      const before = log.querySelectorAll(".turn").length;
      log.setAttribute("aria-busy", String(busy));  // it is read aloud when it is whole
      log.classList.toggle("is-empty", turns.length === 0);
      if (turns.length === 0) return put(log, empty);
      if (before === 0) log.replaceChildren();
      log.fathomHtml = undefined;
      fit(log, turns.length, newTurn);
      turns.forEach((turn, number) => {
        const article = log.children[number];
        put(article.firstElementChild, turn.question);
        const answers = article.lastElementChild;
        fit(answers, turn.answers.length, newCard);
        answers.dataset.count = turn.answers.length;
        turn.answers.forEach((html, which) => put(answers.children[which], html));
      });
      // A new question goes to the top and its answer grows below: nothing moves while it is read.
      if (turns.length > before) {
        log.scrollTop = log.lastElementChild.offsetTop - log.offsetTop;
      }
    };
    buttons(element, trigger, events);
    watch("value", draw);
    draw();
  };

  // The place of a citation: focus goes there, Escape and its button lead back.
  const evidence = (element, props, trigger, watch, events) => {
    let from = null;
    const root = element.querySelector(".shown");
    const close = () => {
      props.value = "";
      draw();
      if (from?.isConnected) from.focus();
    };
    const draw = () => {
      const html = props.value ?? "";
      if (html && !root.firstChild) from = document.activeElement;
      put(root, html);
      if (!html) return;
      root.querySelector("[data-close]")?.focus({ preventScroll: true });
      const mark = root.querySelector("mark, .box");
      const frame = root.querySelector(".frame");
      const aim = () => {
        if (!mark || !frame) return;
        const [here, there] = [mark.getBoundingClientRect(), frame.getBoundingClientRect()];
        frame.scrollTop += here.top - there.top - frame.clientHeight / 3;
      };
      aim();
      root.querySelector("img")?.addEventListener("load", aim, { once: true });
    };
    buttons(element, trigger, events);
    element.addEventListener("click", (event) => {
      if (event.target.closest("[data-close]")) close();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && root.firstChild && element.offsetParent) close();
    });
    watch("value", draw);
    draw();
  };

  // A file made here of what Python sent: {name, type, text}.
  const download = (props, watch) => {
    watch("value", () => {
      if (!props.value) return;
      const { name, type, text } = JSON.parse(props.value);
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type }));
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    });
  };

  return { show, conversation, evidence, download };
})();
