//! Requests under way, where somebody wants to know: their number for `/load`, their names for `/abort_requests`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use shared::ids::RequestId;

use super::Frontend;
use crate::core::engine::RequestKey;

/// Counts only what is asked for: neither costs a server anything that does not tell it.
#[derive(Debug, Default)]
pub(super) struct OpenRequests {
    count: Option<AtomicU64>,
    names: Option<Mutex<HashMap<RequestId, Vec<RequestKey>>>>,
}

impl OpenRequests {
    pub(super) fn new(frontend: &Frontend) -> OpenRequests {
        OpenRequests {
            count: frontend.server_load_tracking.then(AtomicU64::default),
            names: frontend.dev_mode.then(Mutex::default),
        }
    }

    /// An answer was begun.
    pub(super) fn opened(&self, id: &RequestId, key: RequestKey) {
        if let Some(count) = &self.count {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.further(id, key);
    }

    /// One more choice of it.
    pub(super) fn further(&self, id: &RequestId, key: RequestKey) {
        if let Some(mut names) = self.names() {
            names.entry(id.clone()).or_default().push(key);
        }
    }

    /// It is complete, or was broken off.
    pub(super) fn closed(&self, id: &RequestId) {
        if let Some(count) = &self.count {
            count.fetch_sub(1, Ordering::Relaxed);
        }
        if let Some(mut names) = self.names() {
            names.remove(id);
        }
    }

    /// Answers under way; 0 where they are not counted.
    pub(super) fn count(&self) -> u64 {
        self.count.as_ref().map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// Requests in the engine that belong to these names.
    pub(super) fn keys<'n>(&self, names: impl IntoIterator<Item = &'n str>) -> Vec<RequestKey> {
        let Some(open) = self.names() else { return Vec::new() };
        names.into_iter().filter_map(|name| open.get(&RequestId::sanitise(name))).flatten().copied().collect()
    }

    fn names(&self) -> Option<MutexGuard<'_, HashMap<RequestId, Vec<RequestKey>>>> {
        Some(self.names.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
