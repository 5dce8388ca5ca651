//! Records that were folded, kept empty for requests to come.
//!
//! The facts of a record take two or three kilobytes, too much for the allocator's per-thread caches, and they are freed on another
//! thread than the one that asked for them: with every trace kept, that cost a request more than noting its facts.

use std::any::{Any, TypeId};
use std::sync::{Mutex, PoisonError};

use rustc_hash::FxHashMap;

/// The most records of one component that are kept: more than are on their way to be folded at a time.
const MOST: usize = 256;

/// Empty records, by their type.
#[derive(Default)]
pub(crate) struct Spares(Mutex<FxHashMap<TypeId, Vec<Box<dyn Any + Send>>>>);

impl Spares {
    /// An empty record of the type `kind`, if there is one.
    pub(crate) fn take(&self, kind: TypeId) -> Option<Box<dyn Any + Send>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&kind)?.pop()
    }

    /// Keeps an empty record.
    pub(crate) fn keep(&self, record: Box<dyn Any + Send>) {
        let kind = (*record).type_id();
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = kept.entry(kind).or_default();
        if kept.len() < MOST {
            kept.push(record);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_by_type_and_up_to_a_bound() {
        let spares = Spares::default();
        spares.keep(Box::new(7u32));
        assert!(spares.take(TypeId::of::<u64>()).is_none());
        let taken = spares.take(TypeId::of::<u32>()).and_then(|s| s.downcast::<u32>().ok());
        assert_eq!(taken, Some(Box::new(7)));
        (0..2 * MOST).for_each(|i| spares.keep(Box::new(i)));
        assert_eq!((0..2 * MOST).filter(|_| spares.take(TypeId::of::<usize>()).is_some()).count(), MOST);
    }
}
