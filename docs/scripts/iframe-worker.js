/* Search in pages opened as files: browsers start no worker there, so the script of the worker runs in a hidden frame. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.frame = Object.assign(document.createElement("iframe"), {
        hidden: true,
        srcdoc: `<script>postMessage = data => parent.postMessage(data, "*")</script><script src="${url}"></script>`,
        onload: () => {
          const waiting = this.waiting;
          this.waiting = null;
          waiting.forEach(data => this.postMessage(data));
        },
      });
      window.addEventListener("message", event => {
        if (event.source === this.frame.contentWindow)
          this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      document.body.append(this.frame);
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
}
