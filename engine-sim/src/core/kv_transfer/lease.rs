//! Leases: how long the blocks of finished requests are kept for other engines.
//!
//! A table with expiries that move; knows neither blocks nor peers. vLLM's rules: an initial lease, heartbeats that only ever
//! extend it (`max(old, now + extension)`), an end when the blocks are read or nobody asked for them in time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use shared::time::Time;

/// Leases by the name that their blocks are kept under.
#[derive(Clone, Debug)]
pub(super) struct Leases<T> {
    kept: BTreeMap<Arc<str>, (Time, T)>,
    /// The same, by expiry.
    due: BTreeSet<(Time, Arc<str>)>,
}

impl<T> Default for Leases<T> {
    fn default() -> Self {
        Leases { kept: BTreeMap::new(), due: BTreeSet::new() }
    }
}

impl<T> Leases<T> {
    /// Grants a lease until `expiry`. A second one under the same name gives back the first.
    pub(super) fn grant(&mut self, name: Arc<str>, expiry: Time, what: T) -> Option<T> {
        let before = self.end(&name);
        self.due.insert((expiry, Arc::clone(&name)));
        self.kept.insert(name, (expiry, what));
        before
    }

    /// What is leased under this name.
    pub(super) fn get(&self, name: &str) -> Option<&T> {
        self.kept.get(name).map(|(_, what)| what)
    }

    /// Moves an expiry, never back. False if there is no such lease.
    pub(super) fn extend(&mut self, name: &str, until: Time) -> bool {
        let Some((name, mut entry)) = self.kept.remove_entry(name) else { return false };
        if until > entry.0 {
            self.due.remove(&(entry.0, Arc::clone(&name)));
            self.due.insert((until, Arc::clone(&name)));
            entry.0 = until;
        }
        self.kept.insert(name, entry);
        true
    }

    /// Ends a lease.
    pub(super) fn end(&mut self, name: &str) -> Option<T> {
        let (name, (expiry, what)) = self.kept.remove_entry(name)?;
        self.due.remove(&(expiry, name));
        Some(what)
    }

    /// When the next lease expires.
    pub(super) fn next_expiry(&self) -> Option<Time> {
        self.due.first().map(|(at, _)| *at)
    }

    /// Takes a lease that has expired at `now`.
    pub(super) fn expired(&mut self, now: Time) -> Option<(Arc<str>, T)> {
        if self.next_expiry()? > now {
            return None;
        }
        let (_, name) = self.due.pop_first()?;
        let (_, what) = self.kept.remove(&name)?;
        Some((name, what))
    }

    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }
}

#[cfg(test)]
mod tests {
    use shared::time::Dur;

    use super::*;

    fn at(s: u64) -> Time {
        Time::ZERO + Dur::from_secs(s)
    }

    #[test]
    fn a_lease_ends_once_by_its_end_or_by_expiry() {
        let mut leases = Leases::default();
        assert_eq!(leases.grant("a".into(), at(30), 1), None);
        assert_eq!(leases.grant("b".into(), at(31), 2), None);
        assert_eq!((leases.get("a"), leases.next_expiry()), (Some(&1), Some(at(30))));
        assert_eq!((leases.end("a"), leases.end("a")), (Some(1), None));
        assert_eq!(leases.expired(at(30)), None);
        assert_eq!(leases.expired(at(31)), Some(("b".into(), 2)));
        assert_eq!((leases.expired(at(99)), leases.len()), (None, 0));
    }

    #[test]
    fn heartbeats_extend_and_never_shorten() {
        let mut leases = Leases::default();
        leases.grant("a".into(), at(30), ());
        assert!(leases.extend("a", at(25)));
        assert_eq!(leases.next_expiry(), Some(at(30)));
        assert!(leases.extend("a", at(45)));
        assert_eq!((leases.expired(at(44)), leases.next_expiry()), (None, Some(at(45))));
        assert!(!leases.extend("b", at(99)));
    }

    #[test]
    fn a_name_used_again_gives_back_what_it_held() {
        let mut leases = Leases::default();
        leases.grant("a".into(), at(30), 1);
        assert_eq!(leases.grant("a".into(), at(40), 2), Some(1));
        assert_eq!((leases.next_expiry(), leases.len()), (Some(at(40)), 1));
    }
}
