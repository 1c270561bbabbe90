import Foundation

/// A folder whose manifest and files hold together: the one place where a bundle's integrity is checked.
///
/// Nothing that ``open(_:verify:)`` has not looked at is ever loaded. (`Bundle` in Python and Kotlin; here Foundation
/// has that name.)
public struct ModelBundle: Sendable {
    public static let manifestName = "manifest.json"
    /// Beside it, as of `sha256sum manifest.json`: what tells a damaged manifest from another one.
    public static let manifestDigestName = "manifest.json.sha256"

    public let folder: URL
    public let manifest: Manifest

    private init(folder: URL, manifest: Manifest) {
        (self.folder, self.manifest) = (folder, manifest)
    }

    /// A listed file. Throws ``MobileMMError`` when the manifest lists no such file.
    public func file(_ relative: String) throws -> URL {
        guard manifest.files.contains(where: { $0.path == relative }) else {
            throw MobileMMError(
                "\(Self.place(folder, Self.manifestName)): lists no file \(shown(relative)) under 'files'")
        }
        return folder.appendingPathComponent(relative)
    }

    /// What a runtime opens to run this part. Throws ``MobileMMError`` when there is no such part.
    public func partFile(_ name: String) throws -> URL {
        guard let part = manifest.parts[name] else {
            throw MobileMMError(
                "\(Self.place(folder, Self.manifestName)): there is no part \(shown(name)); the bundle has "
                    + manifest.parts.keys.sorted().joined(separator: ", "))
        }
        return folder.appendingPathComponent(part.file)
    }

    /// Opens and checks a bundle; no model is loaded.
    ///
    /// Always checked: the manifest and what it says of itself; that the folder holds the files that it lists, in
    /// their sizes, and no other but hidden ones at its top; and the structure of ONNX parts. With `verify` also what
    /// reads every byte: the files' SHA-256, and that ONNX parts' numbers are finite. Throws ``MobileMMError``, one line, at the first fault.
    public static func open(_ folder: URL, verify: Bool = true) throws -> ModelBundle {
        let folder = folder.absoluteURL
        let manifest = try readManifest(folder)
        try refuseUnlisted(folder, manifest)
        for file in manifest.files {
            let found = try checkPlain(folder, file.path)
            if found != file.bytes {
                throw MobileMMError(
                    "\(place(folder, file.path)): has \(found) bytes; the manifest says \(file.bytes); \(again)")
            }
        }
        if verify {
            for file in manifest.files where try sha256(folder, file.path) != file.sha256 {
                throw MobileMMError(
                    "\(place(folder, file.path)): damaged or changed: its SHA-256 is not what the manifest says; \(again)")
            }
        }
        if manifest.target == "onnx" {
            for name in manifest.parts.keys.sorted() { try OnnxCheck.check(folder, manifest, name, values: verify) }
        }
        return ModelBundle(folder: folder, manifest: manifest)
    }

    /// The checked `manifest.json` of a folder; the files it lists are not looked at.
    public static func readManifest(_ folder: URL) throws -> Manifest {
        guard kind(folder.path) == .typeDirectory else {
            throw MobileMMError("\(folder.path): there is no such folder; give the folder of a bundle")
        }
        let path = place(folder, manifestName)
        guard kind(path) != nil else {
            throw MobileMMError(
                "\(folder.path): is no bundle, because it has no \(manifestName); `mobilemm export` makes one")
        }
        let data = try read(folder, manifestName, most: ManifestReader.largest + 1)
        let manifest = try ManifestReader.parse(Data(data), path: path)
        if kind(place(folder, manifestDigestName)) != nil {
            let said = try read(folder, manifestDigestName, most: 200)
            if said != [UInt8]("\(Sha256.of(data))  \(manifestName)\n".utf8) {
                throw MobileMMError(
                    "\(path): damaged or changed: its SHA-256 is not what \(manifestDigestName) says; \(again)")
            }
        }
        return manifest
    }

    /// The SHA-256 of a plain file in a folder, in hexadecimal.
    static func sha256(_ folder: URL, _ relative: String) throws -> String {
        var hash = Sha256()
        try pieces(folder, relative) { piece in
            piece.withUnsafeBytes { hash.update($0) }
            return true
        }
        return hash.finish()
    }

    private static let again = ManifestReader.again

    private static func place(_ folder: URL, _ relative: String) -> String { folder.path + "/" + relative }

    /// What lies there itself, links not followed; nil where nothing does.
    private static func kind(_ path: String) -> FileAttributeType? {
        (try? FileManager.default.attributesOfItem(atPath: path))?[.type] as? FileAttributeType
    }

    /// The size of a file, when it and the folders between are what they seem: no links, no pipes.
    @discardableResult
    private static func checkPlain(_ folder: URL, _ relative: String) throws -> Int {
        var path = folder.path
        let parts = relative.split(separator: "/")
        for (index, part) in parts.enumerated() {
            path += "/" + part
            guard let found = kind(path) else { throw MobileMMError("\(path): is missing; \(again)") }
            if found != (index < parts.count - 1 ? .typeDirectory : .typeRegular) {
                throw MobileMMError("\(path): is a link or no plain file; \(again)")
            }
        }
        let attributes = try? FileManager.default.attributesOfItem(atPath: path)
        return (attributes?[.size] as? NSNumber)?.intValue ?? -1
    }

    /// A plain file piece by piece, until `each` wants no more.
    private static func pieces(_ folder: URL, _ relative: String, each: (Data) throws -> Bool) throws {
        try checkPlain(folder, relative)
        let path = place(folder, relative)
        do {
            let handle = try FileHandle(forReadingFrom: URL(fileURLWithPath: path))
            defer { try? handle.close() }
            while let piece = try handle.read(upToCount: 1 << 20), !piece.isEmpty, try each(piece) {}
        } catch let error as MobileMMError {
            throw error
        } catch {
            throw MobileMMError("\(path): cannot be read (\(oneLine(error)))")
        }
    }

    private static func read(_ folder: URL, _ relative: String, most: Int) throws -> [UInt8] {
        var found: [UInt8] = []
        try pieces(folder, relative) { piece in
            found += piece.prefix(most - found.count)
            return found.count < most
        }
        return found
    }

    private static func refuseUnlisted(_ folder: URL, _ manifest: Manifest) throws {
        var known: Set<String> = [manifestName, manifestDigestName]
        for file in manifest.files {
            known.insert(file.path)
            let parts = file.path.split(separator: "/")
            for count in 1..<max(parts.count, 1) { known.insert(parts[..<count].joined(separator: "/")) }
        }
        func look(_ inside: String) throws {
            let path = inside.isEmpty ? folder.path : place(folder, inside)
            let names: [String]
            do {
                names = try FileManager.default.contentsOfDirectory(atPath: path)
            } catch {
                throw MobileMMError("\(path): cannot be read (\(oneLine(error)))")
            }
            for name in names.sorted() {
                if inside.isEmpty && name.hasPrefix(".") { continue }
                let relative = inside.isEmpty ? name : "\(inside)/\(name)"
                if !known.contains(relative) {
                    throw MobileMMError(
                        "\(place(folder, manifestName)): the manifest does not list \(shown(relative)), which lies in"
                            + " the folder; remove it")
                }
                if kind(place(folder, relative)) == .typeDirectory { try look(relative) }
            }
        }
        try look("")
    }
}
