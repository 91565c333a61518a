// What the page asks the control plane to do.

/** The control plane refused, or was not there. */
export class ApiError extends Error {
  constructor(code, details) {
    super(details);
    this.code = code;
  }
}

/** Sends JSON; returns the JSON of the answer. */
export async function post(path, body) {
  let answer;
  try {
    answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: AbortSignal.timeout(15000),
    });
  } catch {
    throw new ApiError("UNAVAILABLE", "the control plane does not answer; try again");
  }
  const shown = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new ApiError(shown.error?.code ?? "UNKNOWN", shown.error?.details ?? `HTTP ${answer.status}`);
  return shown;
}
