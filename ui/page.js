// What the page does by itself. Python makes the HTML and hears of the buttons pressed; here that
// HTML is drawn, only where it changed, so that folds stay open and nothing jumps.
"use strict";
window.fathom ??= (() => {
  // A second line behind the escaping in Python: what is not listed here never reaches the page.
  const TAGS = new Set(
    ("article aside b blockquote br button caption cite code dd details div dl dt em figcaption figure form" +
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

  // What this browser keeps of a page for the next one: a number. Where it keeps nothing, `otherwise`.
  const keep = (name, value) => {
    try { localStorage.setItem(`fathom ${name}`, value); } catch { /* it is not allowed to */ }
    return value;
  };
  const kept = (name, otherwise, most) => {
    let text = null;
    try { text = localStorage.getItem(`fathom ${name}`); } catch { /* as above */ }
    const value = Number(text || NaN);
    return value >= 0 && value <= most ? value : otherwise;
  };

  // ---- files given: chosen, or dropped anywhere on the page -------------------------------------

  const MOST_FILES = 50, MOST_BYTES = 2 ** 28;  // of one request
  const MADE_BY_TOOLS = new Set(["node_modules", "__pycache__", "venv", "site-packages"]);
  const isHidden = ({ name }) =>
    name.includes("/") && name.split("/").some((part) => /^\./.test(part) || MADE_BY_TOOLS.has(part));
  const DROP_A_TABLE = "Drop a table of questions";
  const places = [];  // where files can be dropped; the one that is in sight takes them

  const promised = (ask) => new Promise((good, bad) => ask(good, bad));

  // The files of what was dropped, with the folders they lie in.
  const filesOf = async (entry, found) => {
    if (entry.isFile) {
      const file = await promised((good, bad) => entry.file(good, bad));
      found.push({ file, name: entry.fullPath.slice(1) });
    } else {
      const reader = entry.createReader();
      for (let some = [null]; some.length; ) {
        some = await promised((good, bad) => reader.readEntries(good, bad));
        for (const inner of some) await filesOf(inner, found);
      }
    }
  };

  const dropAnywhere = () => {
    const veil = document.createElement("div");
    veil.className = "veil";
    veil.hidden = true;
    const place = () => places.find(({ element }) => element.isConnected && element.offsetParent);
    // On Compare the place is behind a tab of its own, and not made before that was opened.
    const way = () => [...document.querySelectorAll("#of-tables-button")].find((tab) => tab.offsetParent);
    const opened = async () => {
      way()?.click();
      while (way() && !place()) await new Promise(requestAnimationFrame);
      return place();
    };
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragenter", (event) => {
      if (!hasFiles(event) || !(place() || way())) return;
      if (!veil.isConnected) document.body.append(veil);
      veil.textContent = place()?.words ?? DROP_A_TABLE;
      veil.hidden = false;
    });
    document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    veil.addEventListener("dragleave", () => { veil.hidden = true; });
    document.addEventListener("drop", async (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      veil.hidden = true;
      const taking = place() ?? opened();
      const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.());
      const loose = [...event.dataTransfer.files].map((file) => ({ file, name: file.name }));
      const found = [];
      for (const entry of entries) if (entry) await filesOf(entry, found);
      (await taking)?.take(found.length ? found : loose);
    });
  };

  // A component that takes files, by its inputs or by a drop while it is in sight.
  const takes = (element, words, take) => {
    if (!places.length) dropAnywhere();
    places.push({ element, words, take });
    element.addEventListener("change", (event) => {
      const given = [...event.target.files];
      event.target.value = "";  // the same file may be given again
      take(given.map((file) => ({ file, name: file.webkitRelativePath || file.name })));
    });
  };

  const fault = (words) => {
    const problem = document.createElement("div");
    problem.className = "problem";
    problem.role = "alert";
    problem.textContent = words;
    return problem;
  };

  // Send a form; hand over each line of JSON that comes back.
  const post = async (address, form, onLine) => {
    const answer = await fetch(address, { method: "POST", body: form });
    if (!answer.ok) {
      const { error } = await answer.json();
      throw new Error(`${error.message}; ${error.hint}`);
    }
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ; ) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      lines.forEach((line) => onLine(JSON.parse(line)));
    }
  };

  // A component whose files are read into the library, one lot after the other; none is lost.
  const drop = (element, added, into) => {
    const note = element.querySelector(".note");
    const lots = [];
    let isBusy = false;
    const readOn = async () => {
      if (isBusy) return;
      isBusy = true;
      while (lots.length) {
        const { given, collection, shown } = lots[0];
        const form = new FormData();
        form.append("collection", collection);
        for (const { file, name } of given) form.append("files", file, name);
        try {
          await post("/uploads", form, (html) => put(shown, html));
        } catch (error) {
          const words = error instanceof TypeError ? "The files could not be sent; give them again." : error.message;
          shown.replaceChildren(fault(words));
        }
        lots.shift();
        added();
      }
      isBusy = false;
    };
    takes(element, "Drop to add", (given) => {
      const files = given.filter((one) => !isHidden(one));
      const collection = document.querySelector(into || "#nothing")?.value ?? "";
      note.querySelector(":scope > .none")?.remove();
      for (let start = 0; start < files.length; ) {
        let end = start, bytes = 0;
        do bytes += files[end++].file.size;
        while (end < files.length && end - start < MOST_FILES && bytes + files[end].file.size <= MOST_BYTES);
        const shown = document.createElement("section");
        const many = end - start > 1 ? `${end - start} files` : files[start].name;
        put(shown, `<p class="none"></p>`);
        shown.firstElementChild.textContent = `${many}: waiting`;
        note.prepend(shown);
        lots.push({ given: files.slice(start, end), collection, shown });
        start = end;
      }
      readOn();
    });
    window.addEventListener("beforeunload", (event) => lots.length && event.preventDefault());
  };

  // A component that takes a table of questions; `made` tells of what came of it, "" if nothing did.
  const table = (element, address, made) => {
    const note = element.querySelector(".note");
    takes(element, DROP_A_TABLE, async ([given]) => {
      const form = new FormData();
      form.append("file", given.file, given.file.name);
      note.fathomHtml = undefined;
      note.textContent = `Reading ${given.file.name}`;
      try {
        const answer = await fetch(address, { method: "POST", body: form });
        const { made: found, html, error } = await answer.json();
        if (error) return note.replaceChildren(fault(`${error.message}; ${error.hint}`));
        put(note, html);
        made(found);
      } catch {
        note.replaceChildren(fault("The table could not be sent; give it again."));
      }
    });
  };

  // A button that saves what lies at an address of ours.
  document.addEventListener("click", (event) => {
    const address = event.target.closest?.("button[data-save]")?.dataset.save;
    if (!address || !/^\/v1\/batches\//.test(address)) return;
    const link = document.createElement("a");
    link.href = address;
    link.download = "";
    link.click();
  });

  // ---- Gradio's stream of events ------------------------------------------------------------------

  // Gradio's server ends the stream when nothing is left to tell, and its page asks for another only
  // if it has heard of that end when the next event is sent: what is sent while the end is on its way
  // is never answered (Gradio 6.31). So its page gets one stream that does not end, and ours asks the
  // server for the next one whenever an event is out whose end was not told.
  const keepListening = () => {
    const fetchPlainly = window.fetch.bind(window);
    const out = new Set(), told = new Set();  // events: sent, and ended before we knew that they were
    let go = () => {};
    const sent = ({ event_id: event }) => {
      if (told.delete(event)) return;
      out.add(event);
      go();
    };
    const heard = (message) => {
      const [, event] = /^data: {"msg":"process_completed","event_id":"(\w+)"/.exec(message) ?? [];
      if (event && !out.delete(event)) told.add(event);
      return !message.startsWith('data: {"msg":"close_stream"');
    };
    const listen = (request, first) => {
      let reader, isOver = false;
      const pass = async (controller) => {
        const writer = new TextEncoder();
        for (let answer = first; !isOver; answer = await fetchPlainly(request)) {
          reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
          for (let rest = ""; ; ) {
            const { done, value } = await reader.read();
            if (done) break;
            const messages = (rest + value).split("\n\n");
            rest = messages.pop();
            for (const message of messages.filter(heard)) {
              controller.enqueue(writer.encode(`${message}\n\n`));
            }
          }
          if (!out.size) await new Promise((resolve) => { go = resolve; });
        }
      };
      const body = new ReadableStream({
        start: (controller) => { pass(controller).catch((error) => controller.error(error)); },
        cancel: (reason) => { isOver = true; return reader.cancel(reason); },
      });
      return new Response(body, { headers: first.headers });
    };
    window.fetch = async (request, options) => {
      const answer = await fetchPlainly(request, options);
      const { pathname } = new URL(request.url ?? request, location.href);
      if (!answer.ok) return answer;
      const gone = () => {};  // with the page
      if (pathname.endsWith("/queue/join")) answer.clone().json().then(sent, gone);
      return pathname.endsWith("/queue/data") ? listen(request, answer) : answer;
    };
  };
  keepListening();

  return { show, conversation, evidence, download, drop, table, keep, kept };
})();
