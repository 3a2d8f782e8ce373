/* The list of runs, and the state of the run in view while it goes on. */
(() => {
  "use strict";
  const { source, useState, useEffect, useRef } = Pellucid;
  const EVERY = 2000; // ms between two questions to the server

  /** {runs, error}: runs.json, asked for until it has come. */
  Pellucid.useRuns = () => {
    const [answer, setAnswer] = useState({ runs: null, error: null });
    useEffect(() => {
      let timer = null;
      const ask = () => source.get("runs.json").then(
        (runs) => setAnswer({ runs, error: null }),
        (error) => { setAnswer({ runs: null, error }); timer = setTimeout(ask, EVERY); },
      );
      ask();
      return () => clearTimeout(timer);
    }, []);
    return answer;
  };

  /** A run that was resumed from an earlier step has fewer rows or steps than before: what was kept of it is stale. */
  const rewound = (before, now) => before && (now.rows < before.rows || now.steps.length < before.steps.length);

  /** {state, error}: state.json of a run; asked for again while `live`, the run goes on, and the page is seen. */
  Pellucid.useLive = (runId, live) => {
    const [answer, setAnswer] = useState({ runId: null, state: null, error: null });
    const last = useRef(null);
    useEffect(() => {
      if (runId === null) return undefined;
      let timer = null;
      let asking = false;
      let ended = false;
      last.current = null;
      const again = () => { if (!ended && live && !document.hidden && !last.current?.finished) timer = setTimeout(ask, EVERY); };
      const ask = async () => {
        clearTimeout(timer);
        if (asking) return;
        asking = true;
        try {
          const state = await source.get(`run/${runId}/state.json`);
          if (ended) return;
          if (rewound(last.current, state)) source.forget();
          if (last.current?.revision !== state.revision || last.current.finished !== state.finished) setAnswer({ runId, state, error: null });
          else setAnswer((old) => (old.error ? { ...old, error: null } : old));
          last.current = state;
        } catch (error) {
          if (!ended) setAnswer({ runId, state: last.current, error });
        } finally {
          asking = false;
        }
        again();
      };
      const seen = () => { if (!document.hidden && live && !last.current?.finished) ask(); };
      ask();
      document.addEventListener("visibilitychange", seen);
      return () => { ended = true; clearTimeout(timer); document.removeEventListener("visibilitychange", seen); };
    }, [runId, live]);
    return answer.runId === runId ? answer : { state: null, error: null };
  };
})();
