// A stand-in for Apple's module of this name: signatures of what is used, for the type checker alone.
@_exported import Foundation

// Casts such as `data as CFData` cost nothing where these are one type.
public typealias CFData = Data
public typealias CFString = String
public typealias CFURL = URL
public typealias CFDictionary = AnyObject

public struct CGBitmapInfo: OptionSet, Sendable {
    public let rawValue: UInt32
    public init(rawValue: UInt32) { fatalError() }
    public static let byteOrder32Little = CGBitmapInfo(rawValue: 2 << 12)
}
public enum CGImageAlphaInfo: UInt32, Sendable { case none, premultipliedLast, premultipliedFirst, last, first }
public enum CGColorRenderingIntent: Int32, Sendable { case defaultIntent }
public final class CGColorSpace: @unchecked Sendable {
    public static let sRGB: CFString = "kCGColorSpaceSRGB"
    public init?(name: CFString) { fatalError() }
}
public final class CGDataProvider: @unchecked Sendable {
    public init?(data: CFData) { fatalError() }
}
public final class CGImage: @unchecked Sendable {
    public init?(
        width: Int, height: Int, bitsPerComponent: Int, bitsPerPixel: Int, bytesPerRow: Int, space: CGColorSpace,
        bitmapInfo: CGBitmapInfo, provider: CGDataProvider, decode: UnsafePointer<CGFloat>?, shouldInterpolate: Bool,
        intent: CGColorRenderingIntent
    ) { fatalError() }
    public var width: Int { fatalError() }
    public var height: Int { fatalError() }
}
public final class CGContext {
    public init?(
        data: UnsafeMutableRawPointer?, width: Int, height: Int, bitsPerComponent: Int, bytesPerRow: Int,
        space: CGColorSpace, bitmapInfo: UInt32
    ) { fatalError() }
    public func draw(_ image: CGImage, in rect: CGRect, byTiling: Bool = false) { fatalError() }
}
