/** The chat: the session's messages, in order. */

const $ = (id) => document.getElementById(id);

export class Chat {
  #list = $("chat");
  #shown = "";

  /**
   * @param {{messageId: string, displayName: string, text: string, sentAt: number}[]} messages all
   *   that the session keeps
   * @returns {boolean} whether there are new ones
   */
  show(messages) {
    const last = messages.at(-1)?.messageId ?? "";
    const key = `${messages.length} ${messages[0]?.messageId} ${last}`;
    if (key === this.#shown) return false;
    const isFirst = this.#shown === "";
    this.#shown = key;
    const known = new Map([...this.#list.children].map((row) => [row.dataset.id, row]));
    const atEnd = this.#list.scrollHeight - this.#list.scrollTop - this.#list.clientHeight < 40;
    const rows = messages.map((message) => known.get(message.messageId) ?? chatRow(message));
    // Unchanged rows stay in place: a screen reader would read new ones again.
    for (const row of known.values()) {
      if (!rows.includes(row)) row.remove();
    }
    rows.forEach((row, at) => {
      if (this.#list.children[at] !== row) this.#list.insertBefore(row, this.#list.children[at] ?? null);
    });
    if (atEnd) this.#list.scrollTop = this.#list.scrollHeight;
    return !isFirst;
  }
}

function chatRow({ messageId, displayName, text, sentAt }) {
  const row = document.createElement("p");
  const name = document.createElement("span");
  const time = document.createElement("time");
  const at = new Date(sentAt);
  row.dataset.id = messageId;
  name.className = "name";
  name.textContent = displayName;
  time.dateTime = at.toISOString();
  time.textContent = at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  row.append(time, name, text);
  return row;
}
