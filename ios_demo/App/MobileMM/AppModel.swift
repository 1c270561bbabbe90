import Foundation
import MobileMMKit
import SwiftUI

/// What all screens share: the bundles on this device, the one that is open, and its conversation.
@MainActor
@Observable
final class AppModel {
    static let shared = AppModel()

    let library: Library
    let chat = ChatModel()
    private(set) var names: [String] = []
    private(set) var selected: String?
    private(set) var bundle: ModelBundle?
    private(set) var backend: (any Backend)?
    private(set) var busy: String?
    var failure: String?

    private init() {
        let support = FileManager.default.urls(for: .applicationSupportDirectory, in: .userDomainMask)[0]
        library = Library(support.appendingPathComponent("bundles"))
    }

    /// Opens the bundle that was used last, or the first there is.
    func start() async {
        if bundle != nil { return }
        refresh()
        let last = UserDefaults.standard.string(forKey: "selected")
        if let name = names.first(where: { $0 == last }) ?? names.first { await select(name) }
    }

    func refresh() { names = library.names() }

    /// Opens a bundle: its files are checked and compiled, its parts loaded when they are first used.
    func select(_ name: String) async {
        await working("Opening \(name)") {
            let folder = try self.library.folder(name)
            let opened = try await Task.detached { try ModelBundle.open(folder) }.value
            let backend = try await openBackend(opened)
            let session = try await Session(
                opened, backend, sampling: Sampling(maxNewTokens: 512), keepVision: Memory.isPlenty(for: opened),
                sketches: true)
            self.chat.begin(session)
            (self.bundle, self.backend, self.selected) = (opened, backend, name)
            UserDefaults.standard.set(name, forKey: "selected")
        }
    }

    /// Takes a bundle's folder, or the zip file of one.
    func add(_ source: URL) async {
        let name = source.lastPathComponent
        await working("Importing \(name)") {
            let isOurs = source.startAccessingSecurityScopedResource()
            defer { if isOurs { source.stopAccessingSecurityScopedResource() } }
            let library = self.library
            _ = try await Task.detached {
                if source.hasDirectoryPath { return try library.add(source) }
                return try library.importZip(source) { done, total in self.tell("Importing \(name)", done, total) }
            }.value
            self.refresh()
        }
    }

    func download(_ address: String) async {
        guard let url = URL(string: address), url.scheme == "https" || url.scheme == "http" else {
            failure = "Give the address of a bundle's folder, beginning with https://"
            return
        }
        await working("Downloading") {
            _ = try await self.library.download(url) { done, total in self.tell("Downloading", done, total) }
            self.refresh()
        }
    }

    func delete(_ name: String) {
        do {
            if name == selected {
                chat.end()
                (bundle, backend, selected) = (nil, nil, nil)
            }
            try library.delete(name)
        } catch {
            failure = oneLine(error)
        }
        refresh()
    }

    /// How far it is, unless it has ended by now.
    private nonisolated func tell(_ what: String, _ done: Int, _ total: Int) {
        let text = "\(what): \(done / 1_000_000) of \(total / 1_000_000) MB"
        Task { @MainActor in if busy != nil { busy = text } }
    }

    /// Runs what takes long, one at a time; what it throws is shown.
    private func working(_ what: String, _ action: () async throws -> Void) async {
        guard busy == nil else { return }
        (busy, failure) = (what, nil)
        do { try await action() } catch { failure = oneLine(error) }
        busy = nil
    }
}
