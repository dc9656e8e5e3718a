//! Interfaces, addresses and routes: read on the old kernel, put back on the new one.
//!
//! Restored connections need their local address and a route before they exist. What a
//! kernel makes by itself (the local table, routes derived from addresses, link-local
//! addresses) is left to it.

use super::modules;
use super::rtnetlink::Rtnetlink;
use crate::model::frozen::{Interface, Route, System};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use serde_bytes::ByteBuf;
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// `RT_TABLE_LOCAL`, which the kernel keeps by itself.
const TABLE_LOCAL: u32 = 255;

/// How long an interface may take to appear behind its driver.
const PROBE: Duration = Duration::from_secs(5);

/// Why the network could not be read or put back.
#[derive(Debug, thiserror::Error)]
#[error("{operation}: {source}; compare ip address and ip route")]
pub struct NetworkError {
    operation: String,
    source: io::Error,
}

fn failed(operation: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError {
        operation: operation.into(),
        source,
    }
}

/// Interfaces with addresses, and the routes over them.
///
/// # Errors
/// rtnetlink refuses.
pub fn collect() -> Result<(Vec<Interface>, Vec<Route>), NetworkError> {
    let mut rtnetlink = Rtnetlink::open().map_err(failed("open rtnetlink"))?;
    let links = links(&mut rtnetlink).map_err(failed("read interfaces"))?;
    let names: BTreeMap<u32, String> = links
        .iter()
        .map(|(index, link)| (*index, link.name.clone()))
        .collect();
    let mut links = links;
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let answers = rtnetlink.dump(request).map_err(failed("read addresses"))?;
    for answer in answers {
        if let RouteNetlinkMessage::NewAddress(message) = answer
            && let Some(text) = address_text(&message)
            && let Some(link) = links.get_mut(&message.header.index)
        {
            link.addresses.push(text);
        }
    }
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        let request = RouteNetlinkMessage::GetRoute(message);
        let answers = rtnetlink.dump(request).map_err(failed("read routes"))?;
        routes.extend(answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(message) => route(&message, &names),
            _ => None,
        }));
    }
    // A gateway must be reachable when its route is added.
    routes.sort_by_key(|route| route.gateway.is_some());
    let configured = links.into_values();
    let configured = configured.filter(|link| link.up || !link.addresses.is_empty());
    Ok((configured.collect(), routes))
}

fn links(rtnetlink: &mut Rtnetlink) -> io::Result<BTreeMap<u32, Interface>> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let answers = rtnetlink.dump(request)?.into_iter();
    Ok(answers
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(message) => {
                Some((message.header.index, interface(&message)))
            }
            _ => None,
        })
        .collect())
}

fn interface(message: &LinkMessage) -> Interface {
    let mut interface = Interface {
        up: message.header.flags.contains(LinkFlags::Up),
        ..Interface::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Address(mac) => interface.mac = ByteBuf::from(mac.clone()),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            _ => {}
        }
    }
    interface.driver = driver(&interface.name);
    interface
}

/// Module of an interface's driver.
fn driver(name: &str) -> Option<String> {
    let link = Path::new("/sys/class/net").join(name);
    let module = link.join("device/driver/module").canonicalize().ok()?;
    Some(module.file_name()?.to_string_lossy().into_owned())
}

/// `ADDR/PREFIX`, unless the kernel adds it by itself.
fn address_text(message: &AddressMessage) -> Option<String> {
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            // With a peer, this is the own end and Address the other one.
            AddressAttribute::Local(local) => address = Some(*local),
            AddressAttribute::Address(other) if address.is_none() => address = Some(*other),
            _ => {}
        }
    }
    let address = address?;
    let by_kernel = match address {
        IpAddr::V4(ip) => ip == Ipv4Addr::LOCALHOST,
        IpAddr::V6(ip) => ip == Ipv6Addr::LOCALHOST || message.header.scope == AddressScope::Link,
    };
    (!by_kernel).then(|| format!("{address}/{}", message.header.prefix_len))
}

/// The route as an image carries it; `None` for one that the kernel makes by itself.
fn route(message: &RouteMessage, names: &BTreeMap<u32, String>) -> Option<Route> {
    let header = &message.header;
    if header.kind != RouteType::Unicast
        || header.protocol == RouteProtocol::Kernel
        || header.flags.contains(RouteFlags::Cloned)
    {
        return None;
    }
    let mut route = Route {
        v6: header.address_family == AddressFamily::Inet6,
        table: header.table.into(),
        scope: header.scope.into(),
        protocol: header.protocol.into(),
        ..Route::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                let prefix = header.destination_prefix_length;
                route.destination = Some(format!("{}/{prefix}", ip(to)?));
            }
            RouteAttribute::Gateway(gateway) => route.gateway = Some(ip(gateway)?.to_string()),
            RouteAttribute::PrefSource(source) => route.source = Some(ip(source)?.to_string()),
            RouteAttribute::Oif(index) => route.interface.clone_from(names.get(index)?),
            RouteAttribute::Priority(priority) => route.priority = *priority,
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::MultiPath(_) => {
                tracing::warn!("A multipath route is not carried over; add it again afterwards");
                return None;
            }
            _ => {}
        }
    }
    (route.table != TABLE_LOCAL && !route.interface.is_empty()).then_some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// Puts the network back as it was. What could not be done is returned: with part of the
/// network there, applications are restored all the same.
#[must_use]
pub fn apply(system: &System) -> Vec<String> {
    let mut rtnetlink = match Rtnetlink::open() {
        Ok(rtnetlink) => rtnetlink,
        Err(error) => return vec![format!("open rtnetlink: {error}")],
    };
    let mut failures = Vec::new();
    let mut indices = BTreeMap::new();
    for interface in &system.interfaces {
        match put_interface(&mut rtnetlink, interface) {
            Ok(index) => {
                indices.insert(interface.name.clone(), index);
            }
            Err(error) => failures.push(error.to_string()),
        }
    }
    for route in &system.routes {
        if let Err(error) = put_route(&mut rtnetlink, route, &indices) {
            failures.push(error.to_string());
        }
    }
    failures
}

/// Finds an interface by its hardware address and, among those that share one (or have
/// none, as `lo`), by name.
fn find(links: &BTreeMap<u32, Interface>, wanted: &Interface) -> Option<(u32, Interface)> {
    let same = |(_, link): &(&u32, &Interface)| link.mac == wanted.mac;
    let named = |(_, link): &(&u32, &Interface)| link.mac == wanted.mac && link.name == wanted.name;
    let found = links.iter().find(named).or(links.iter().find(same));
    found.map(|(index, link)| (*index, link.clone()))
}

fn put_interface(rtnetlink: &mut Rtnetlink, wanted: &Interface) -> Result<u32, NetworkError> {
    let at = |step: &str| failed(format!("{step} interface {}", wanted.name));
    let begun = Instant::now();
    let mut asked = false;
    let (index, link) = loop {
        let links = links(rtnetlink).map_err(at("find"))?;
        if let Some(found) = find(&links, wanted) {
            break found;
        }
        if let (Some(driver), false) = (&wanted.driver, asked) {
            modules::load(&[driver]);
            asked = true;
        } else if begun.elapsed() > PROBE {
            return Err(at("find")(io::ErrorKind::NotFound.into()));
        } else {
            sleep(Duration::from_millis(2));
        }
    };
    let mut change = LinkMessage::default();
    change.header.index = index;
    if link.name != wanted.name {
        // udev would rename it later, which takes an interface that is down.
        let name = LinkAttribute::IfName(wanted.name.clone());
        change.attributes.push(name);
    }
    if link.mtu != wanted.mtu && wanted.mtu != 0 {
        change.attributes.push(LinkAttribute::Mtu(wanted.mtu));
    }
    if !change.attributes.is_empty() {
        let request = RouteNetlinkMessage::SetLink(change);
        rtnetlink.set(request).map_err(at("set up"))?;
    }
    for text in &wanted.addresses {
        let step = format!("add address {text} to interface {}", wanted.name);
        let (address, prefix) =
            parse_address(text).ok_or_else(|| failed(&*step)(io::ErrorKind::InvalidData.into()))?;
        let request = RouteNetlinkMessage::NewAddress(address_message(index, address, prefix));
        rtnetlink.set(request).map_err(failed(step))?;
    }
    if wanted.up {
        let mut change = LinkMessage::default();
        change.header.index = index;
        change.header.flags = LinkFlags::Up;
        change.header.change_mask = LinkFlags::Up;
        let request = RouteNetlinkMessage::SetLink(change);
        rtnetlink.set(request).map_err(at("bring up"))?;
    }
    Ok(index)
}

fn parse_address(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let (address, prefix): (IpAddr, u8) = (address.parse().ok()?, prefix.parse().ok()?);
    let longest = if address.is_ipv4() { 32 } else { 128 };
    (prefix <= longest).then_some((address, prefix))
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

fn address_message(index: u32, address: IpAddr, prefix: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.family = family(address);
    message.header.prefix_len = prefix;
    message.attributes = vec![
        AddressAttribute::Local(address),
        AddressAttribute::Address(address),
    ];
    if address.is_ipv6() {
        // It was ours a moment ago: no time for duplicate address detection.
        message.header.flags = AddressHeaderFlags::Nodad;
        let flags = AddressAttribute::Flags(AddressFlags::Nodad);
        message.attributes.push(flags);
    }
    message
}

fn put_route(
    rtnetlink: &mut Rtnetlink,
    route: &Route,
    indices: &BTreeMap<String, u32>,
) -> Result<(), NetworkError> {
    let step = || {
        let to = route.destination.as_deref().unwrap_or("default");
        failed(format!("add route {to} over {}", route.interface))
    };
    let index = indices.get(&route.interface).copied();
    let index = index.ok_or_else(|| step()(io::ErrorKind::NotFound.into()))?;
    let message =
        route_message(route, index).ok_or_else(|| step()(io::ErrorKind::InvalidData.into()))?;
    let request = RouteNetlinkMessage::NewRoute(message);
    rtnetlink.set(request).map_err(step())
}

fn route_message(route: &Route, index: u32) -> Option<RouteMessage> {
    let mut message = RouteMessage::default();
    message.header.address_family = if route.v6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    };
    message.header.kind = RouteType::Unicast;
    message.header.protocol = route.protocol.into();
    message.header.scope = route.scope.into();
    let mut attributes = vec![
        RouteAttribute::Oif(index),
        // The header's field is too short for most numbers.
        RouteAttribute::Table(route.table),
    ];
    if let Some(to) = &route.destination {
        let (to, prefix) = parse_address(to)?;
        message.header.destination_prefix_length = prefix;
        attributes.push(RouteAttribute::Destination(to.into()));
    }
    if let Some(gateway) = &route.gateway {
        let gateway: IpAddr = gateway.parse().ok()?;
        attributes.push(RouteAttribute::Gateway(gateway.into()));
    }
    if let Some(source) = &route.source {
        let source: IpAddr = source.parse().ok()?;
        attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    if route.priority != 0 {
        attributes.push(RouteAttribute::Priority(route.priority));
    }
    message.attributes = attributes;
    Some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Through the message the kernel would get and back.
    fn check(expect: &Route) {
        let message = route_message(expect, 7).unwrap();
        let names = BTreeMap::from([(7, expect.interface.clone())]);
        assert_eq!(route(&message, &names).as_ref(), Some(expect));
    }

    #[test]
    fn routes_come_back_as_they_were() {
        let default = Route {
            gateway: Some("10.0.2.2".into()),
            interface: "eth0".into(),
            table: 254,
            protocol: 3,
            priority: 100,
            source: Some("10.0.2.15".into()),
            ..Route::default()
        };
        check(&default);
        check(&Route {
            destination: Some("192.168.0.0/24".into()),
            interface: "eth1".into(),
            scope: 253,
            table: 1000,
            ..Route::default()
        });
        check(&Route {
            destination: Some("fd00::/64".into()),
            v6: true,
            gateway: Some("fe80::1".into()),
            ..default
        });
    }

    #[test]
    fn routes_of_the_kernel_are_left_to_it() {
        let route_of = |change: &dyn Fn(&mut RouteMessage)| {
            let mut message = route_message(
                &Route {
                    interface: "eth0".into(),
                    table: 254,
                    ..Route::default()
                },
                1,
            )
            .unwrap();
            change(&mut message);
            route(&message, &BTreeMap::from([(1, "eth0".to_owned())]))
        };
        assert!(route_of(&|_| {}).is_some());
        assert_eq!(
            route_of(&|m| m.header.protocol = RouteProtocol::Kernel),
            None
        );
        assert_eq!(route_of(&|m| m.header.kind = RouteType::Local), None);
        let local = RouteAttribute::Table(TABLE_LOCAL);
        assert_eq!(route_of(&|m| m.attributes.push(local.clone())), None);
    }

    #[test]
    fn addresses_come_back_as_they_were() {
        for text in ["10.0.2.15/24", "fd00::1/64"] {
            let (address, prefix) = parse_address(text).unwrap();
            let message = address_message(2, address, prefix);
            assert_eq!(address_text(&message).as_deref(), Some(text));
        }
        for bad in ["10.0.2.15", "10.0.2.15/33", "x/8", "fd00::1/129"] {
            assert_eq!(parse_address(bad), None, "{bad}");
        }
        let localhost = address_message(1, Ipv4Addr::LOCALHOST.into(), 8);
        assert_eq!(address_text(&localhost), None);
    }

    #[test]
    fn interfaces_are_found_by_hardware_address() {
        let link = |name: &str, mac: &[u8]| Interface {
            name: name.into(),
            mac: ByteBuf::from(mac),
            ..Interface::default()
        };
        let links = BTreeMap::from([(1, link("lo", &[0; 6])), (2, link("ens3", &[2; 6]))]);
        assert_eq!(find(&links, &link("eth0", &[2; 6])).unwrap().0, 2);
        assert_eq!(find(&links, &link("lo", &[0; 6])).unwrap().0, 1);
        assert!(find(&links, &link("eth0", &[3; 6])).is_none());
    }

    #[test]
    fn the_loopback_interface_is_read() {
        let (interfaces, _) = collect().unwrap();
        assert!(interfaces.iter().all(|link| !link.name.is_empty()));
    }
}
