// The stream of what the page shows, and how old that is.

const STALE = 5000, AGAIN = 1000;

/** Listens to one view at a time; comes back by itself, however often the control plane goes. */
export class Feed {
  /** onState(state, clock): something to show. onHeard(clock): it is current. onSignedOut(): nobody is signed in. */
  constructor({ onState, onHeard, onSignedOut }) {
    Object.assign(this, { onState, onHeard, onSignedOut });
    this.address = null;
    this.heardAt = performance.now();
    this.source = null;
    this.timer = null;
    this.paused = false;
  }

  /** Milliseconds since the control plane was heard, once that is too long; else 0. */
  get stale() {
    const silent = performance.now() - this.heardAt;
    return this.address !== null && !this.paused && silent > STALE ? silent : 0;
  }

  watch(view, parameters) {
    const query = new URLSearchParams(parameters).toString();
    this.address = `/api/feed/${view}${query ? `?${query}` : ""}`;
    this.connect();
  }

  stop() {
    this.address = null;
    this.disconnect();
  }

  /** A page that nobody sees needs no stream; browsers allow six of one host. */
  pause() {
    this.paused = true;
    this.disconnect();
  }

  resume() {
    this.paused = false;
    this.heardAt = performance.now();
    if (this.address !== null) this.connect();
  }

  disconnect() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = null;
  }

  connect() {
    this.disconnect();
    if (this.paused) return;
    const address = this.address;
    const source = (this.source = new EventSource(address));
    source.addEventListener("state", ({ data }) => {
      const end = data.indexOf("\n");
      this.heard(Number(data.slice(0, end)));
      this.onState(JSON.parse(data.slice(end + 1)), Number(data.slice(0, end)));
    });
    source.addEventListener("beat", ({ data }) => this.heard(Number(data)));
    source.addEventListener("error", () => {
      if (this.source !== source) return;
      this.disconnect();
      this.timer = setTimeout(() => this.ask(address), AGAIN);
    });
  }

  heard(clock) {
    this.heardAt = performance.now();
    this.onHeard(clock);
  }

  /** Whether it is the session that has ended, or the control plane that is gone. */
  async ask(address) {
    let status = 0;
    try {
      ({ status } = await fetch("/api/session", { signal: AbortSignal.timeout(STALE) }));
    } catch {
      // It is gone. What was shown stays.
    }
    if (this.address !== address) return;
    if (status === 401) {
      this.stop();
      this.onSignedOut();
    } else if (status === 200) {
      this.connect();
    } else {
      this.timer = setTimeout(() => this.ask(address), AGAIN);
    }
  }
}
