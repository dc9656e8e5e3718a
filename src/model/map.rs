//! Maps by the addresses of kernel objects.
//!
//! Nobody can choose addresses to make them collide, so the hash is a fast one. It is the same
//! in every run, but the order of a map means nothing: what is shown or sent is sorted.

use rustc_hash::FxBuildHasher;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::Hash;

/// A map by an identity.
pub type Map<K, V> = HashMap<K, V, FxBuildHasher>;
/// A set of identities.
pub type Set<K> = HashSet<K, FxBuildHasher>;

/// What a sorted and a hashed map have in common.
pub(super) trait Keyed<K, V> {
    fn at(&self, key: &K) -> Option<&V>;
    fn entries<'a>(&'a self) -> impl Iterator<Item = (&'a K, &'a V)>
    where
        K: 'a,
        V: 'a;
    fn put(&mut self, key: K, value: V);
    fn take(&mut self, key: &K) -> Option<V>;
}

macro_rules! keyed {
    ($map:ident, $($bound:tt)+) => {
        impl<K: $($bound)+, V> Keyed<K, V> for $map<K, V> {
            fn at(&self, key: &K) -> Option<&V> {
                self.get(key)
            }

            fn entries<'a>(&'a self) -> impl Iterator<Item = (&'a K, &'a V)>
            where
                K: 'a,
                V: 'a,
            {
                self.iter()
            }

            fn put(&mut self, key: K, value: V) {
                self.insert(key, value);
            }

            fn take(&mut self, key: &K) -> Option<V> {
                self.remove(key)
            }
        }
    };
}

keyed!(BTreeMap, Ord);
keyed!(Map, Eq + Hash);
