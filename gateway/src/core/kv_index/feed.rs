//! The sequence of one engine's batches: which is the next one, which is known, where one is missing.

/// What a batch is to the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It follows.
    Next,
    /// It was taken already, in a replay for example.
    Known,
    /// The engine began to count anew: its cache was emptied by a restart.
    Restarted,
    /// The batch `from` and those after it were lost, or were never heard.
    Gap {
        /// The first one that is missing.
        from: u64,
    },
}

/// Where the sequence of one engine stands.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Feed {
    next: u64,
    /// When the newest batch was made; `None` before the first one.
    newest: Option<u64>,
}

impl Feed {
    /// What a batch with this number, made at that time, is.
    pub(super) fn judge(&self, seq: u64, made: u64) -> Verdict {
        if seq == self.next {
            return Verdict::Next;
        }
        if seq > self.next {
            return Verdict::Gap { from: self.next };
        }
        // An engine never counts backwards: with a smaller number a newer batch is another engine's.
        match self.newest {
            Some(newest) if made <= newest => Verdict::Known,
            Some(_) | None => Verdict::Restarted,
        }
    }

    /// A batch was taken.
    pub(super) fn took(&mut self, seq: u64, made: u64) {
        self.next = seq + 1;
        self.newest = Some(self.newest.map_or(made, |newest| newest.max(made)));
    }

    /// The number of the next batch.
    pub(super) const fn next(&self) -> u64 {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_each_other() {
        let mut feed = Feed::default();
        let mut check = |seq, made, expect| {
            let verdict = feed.judge(seq, made);
            assert_eq!(verdict, expect, "batch {seq} made at {made}");
            if verdict == Verdict::Next {
                feed.took(seq, made);
            }
        };
        check(3, 30, Verdict::Gap { from: 0 });
        check(0, 0, Verdict::Next);
        check(1, 10, Verdict::Next);
        check(4, 40, Verdict::Gap { from: 2 });
        check(2, 20, Verdict::Next);
        check(1, 10, Verdict::Known);
        check(0, 50, Verdict::Restarted);
    }
}
